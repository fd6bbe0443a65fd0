"""Judges of texts and images: lexicons, classifiers, language models and measures of pixels."""
