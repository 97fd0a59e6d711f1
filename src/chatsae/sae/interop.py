"""Reading and writing SAE directories that both generations of sae_lens understand.

A directory holds `cfg.json`, `sae_weights.safetensors` and, if wanted, `sparsity.safetensors`. Our cfg.json carries the
nested keys of sae_lens 6 beside the flat ones of sae_lens 3 to 5. What only chatsae knows stands in `metadata.chatsae`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib import metadata as distribution
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatsae.config import Architecture, Form, SAESpec
from chatsae.errors import UserError
"""
"""
