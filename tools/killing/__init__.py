"""What tools/kill.py is made of: processes that die at a chosen file operation or moment, and comparison of trees."""
