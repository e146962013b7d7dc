"""Evaluation by the field's protocols: prompted masks, interactive clicks, latency, and a page about them."""
