"""Keys of the config that more than one layer must know. It imports nothing."""

# In the group `trainer`, but not arguments of Lightning's Trainer.
NON_TRAINER_KEYS = frozenset({"trainer.threads", "trainer.compile"})
