"""From vectors back to tokens: quantization as a map from vectors to codes, not int8 arithmetic.

Empty so far: the trunk's own head gives distributions over tokens, which need no way back.
"""
