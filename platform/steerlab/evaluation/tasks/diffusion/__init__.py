"""What do the images show?"""
