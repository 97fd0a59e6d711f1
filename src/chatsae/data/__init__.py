"""From raw rows to tokens: sources, normalise, dedup, render, and the built-in corpus pydocs."""
