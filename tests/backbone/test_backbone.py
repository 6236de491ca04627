"""What holds for every backbone."""

import pytest
import torch
from backbone.conftest import awaken

