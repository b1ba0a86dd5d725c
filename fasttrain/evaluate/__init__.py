"""Quality of features: nearest neighbours, linear classifiers and the spectrum."""
