"""What does the patch cost?"""
