"""The command that the card of the colour-digits Sana names; it is `fraqat.zoo.train_color_digits` with one choice made.

python -m fraqat.zoo.train_color_digits_sana --work DIR --out DIR
"""

import sys

from fraqat.zoo.train_color_digits import main

if __name__ == "__main__":
    sys.argv[1:1] = ["--architecture", "sana"]
    main()
