"""Who judges an answer: lexicons, classifiers, models, pixels."""
