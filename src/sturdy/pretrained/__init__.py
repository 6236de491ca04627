"""Pretrained networks of others; only this room imports diffusers, transformers and peft."""
