"""Sounds as pictures: WAV files to log-mel spectrograms of one channel, and back."""
