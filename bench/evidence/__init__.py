"""Campaigns of trainings that measure what the methods reach."""
