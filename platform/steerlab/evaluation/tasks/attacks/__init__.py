"""Does the model execute what an attacker wrote into the data?"""
