"""Words that needles are named by: every adjective with every noun, ten thousand names such as `amber-harbor`."""

_ADJECTIVES = """
able amber ancient arctic autumn bitter blank bold brave brief bright broad bronze calm careful cheerful clean clever
cold common cosmic crimson curious dark deep distant dry eager early easy elastic empty faint fair famous fancy fast
fierce final flat fragile fresh gentle giant glad golden grand great green happy heavy hidden hollow honest humble icy
ivory jolly keen kind large late lazy light little lively lonely loud lucky marble mellow misty modern narrow noble odd
olive pale patient plain polite proud quick quiet rapid rare red robust rough royal rustic scarlet secret sharp silent
silver simple sleepy small smooth
"""
_NOUNS = """
acorn anchor anvil apple arrow badge bakery barrel basket beacon bell bicycle blanket boat book bottle bridge broom
bucket button cabin camera candle canyon carpet castle cave chair chapel chimney clock cloud coin comet compass cradle
curtain desert desk dragon drum eagle easel engine falcon feather fence ferry field flute forest fountain garden gate
glacier glove guitar hammer harbor hat helmet hill island jacket jar kettle key kite ladder lake lamp lantern leaf
lemon library lighthouse magnet map market meadow mirror mountain needle oak orchard otter oven owl paddle paper parade
pepper piano pillow planet pocket quarry rabbit river saddle
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
