"""The Wan DiT: what it is (config, param_map), the model itself (model and what it is made of), and how it is put on
ranks (layers, parallelize, provider, views)."""
