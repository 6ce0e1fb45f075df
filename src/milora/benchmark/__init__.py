"""Speed and memory of the methods, measured side by side in one process."""

from milora.benchmark.decode import DecodeSettings, decode, decode_methods
from milora.benchmark.kernel import KernelSettings, kernel
from milora.benchmark.prefill import PrefillSettings, prefill
from milora.benchmark.result import Result
from milora.benchmark.tenants import TenantsSettings, tenants
from milora.benchmark.traffic import TrafficSettings, traffic
from milora.benchmark.train import TrainSettings, train_steps

__all__ = [
    "DecodeSettings",
    "KernelSettings",
    "PrefillSettings",
    "Result",
    "TenantsSettings",
    "TrafficSettings",
    "TrainSettings",
    "decode",
    "decode_methods",
    "kernel",
    "prefill",
    "tenants",
    "traffic",
    "train_steps",
]
