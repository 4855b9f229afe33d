"""Sums over sites of which nobody sees a part: members, masks, the group, shares of noise.

What protects a site's vector is that every member's masks hang on the whole announcement, so they
cancel for exactly the set that every honest member was shown, and for nothing else.
"""
