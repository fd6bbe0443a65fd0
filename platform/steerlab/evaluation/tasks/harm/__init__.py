"""Does the model do harm, or refuse what is harmless?"""
