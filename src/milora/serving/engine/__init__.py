"""The embedded engine: continuous batching of many tenants' requests on one backbone."""

from milora.serving.engine.engine import Engine
from milora.serving.engine.settings import EngineSettings

__all__ = ["Engine", "EngineSettings"]
