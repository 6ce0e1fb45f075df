"""Speed and memory of the methods, measured side by side in one process."""

from milora.benchmark.decode import DecodeSettings, decode
from milora.benchmark.result import Result
from milora.benchmark.settings import Settings

__all__ = ["DecodeSettings", "Result", "Settings", "decode"]
