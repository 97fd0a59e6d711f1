"""Prepared data on the disk: selected, tokenised, written in shards under a manifest, and read back."""
