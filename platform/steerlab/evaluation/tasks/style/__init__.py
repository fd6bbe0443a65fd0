"""Does the model write as the patch wants it to?"""
