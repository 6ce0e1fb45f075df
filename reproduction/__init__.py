"""The paper's tables and figures: runs, records and reports. Not part of the package; see `reproduction/README.md`."""
