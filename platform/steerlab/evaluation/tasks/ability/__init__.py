"""What can the model still do?"""
