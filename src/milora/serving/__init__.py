"""The embedded server: many tenants on one backbone, in one process."""
