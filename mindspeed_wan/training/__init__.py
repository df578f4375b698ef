"""Training: the main of ``pretrain_sora.py``, its loop and step, optimizer, metrics."""
