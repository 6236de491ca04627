"""Networks that others trained. Only this package imports diffusers and transformers."""
