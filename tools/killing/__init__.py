"""What tools/kill.py is made of: processes that die at a chosen file operation or moment, and comparison of trees."""

import os

# A process without threads is one that can be forked; set before torch and tokenizers are imported.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
