"""Losses of contrastive pretraining and of AP fine-tuning."""
