"""Trivec: self-hosted text embeddings behind the OpenAI API."""

__version__ = "0.1.0"
