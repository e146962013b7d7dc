"""Prediction with trained models: files, arrays, box prompts, model archives."""
