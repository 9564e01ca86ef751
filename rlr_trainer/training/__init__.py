"""`RLRTrainer`, its options, and what an update does."""
