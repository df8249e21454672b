"""Finds, reads, decodes and preprocesses images. It runs no model."""
