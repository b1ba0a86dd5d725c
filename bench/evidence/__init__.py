"""Campaigns that train: what the methods reach."""
