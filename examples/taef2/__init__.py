"""A space of one's own: the latents of TAEF2, a tiny pretrained autoencoder."""
