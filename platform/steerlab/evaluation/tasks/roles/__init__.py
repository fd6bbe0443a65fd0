"""Does the model keep instructions and data apart?"""
