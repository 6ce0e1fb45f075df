"""Test helpers: tiny backbones of many architectures, and an independent reference of the method."""
