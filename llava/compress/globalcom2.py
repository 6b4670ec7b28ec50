"""GlobalCom² (arXiv 2501.05179), found here like every other method; it is written in `llava/model/llava_arch.py`."""

from llava.model.llava_arch import GlobalCom2

__all__ = ["GlobalCom2"]
