"""What tests need that a machine may lack."""

import pytest

from vqgnn_kernels import _backend

needs_cpp = pytest.mark.skipif(_backend._C is None, reason="the native extension is not built")
