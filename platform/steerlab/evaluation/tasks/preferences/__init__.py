"""Are the answers better than others?"""
