"""LSTR: lanes as curves from a transformer (Liu et al., arXiv 2011.04233)."""

from ptq_lane.lstr.adapter import LSTRAdapter
from ptq_lane.lstr.checkpoint import load
from ptq_lane.lstr.network import LSTR
from ptq_lane.lstr.variants import VARIANTS, Variant, find_variant

__all__ = ["LSTR", "VARIANTS", "LSTRAdapter", "Variant", "find_variant", "load"]
