"""Made-up text: words, names, numbers and lines, with a held-out share that training never sees."""

from __future__ import annotations

import string
import zlib
from functools import lru_cache
from random import Random

# A list written for this project; the order does not matter.
_COMMON_TEXT = """
the of and to in is that for it as was with on at by from or an be this are not have has had but
all they you we he she his her their its one two three four five six seven eight nine ten which
when there can more if no out so what up about into than them then some could time these may only
other new over any such after also many before must through where how our well should because each
just those people
"""
_COMMON = _COMMON_TEXT.split()
_LEXICON_TEXT = """
able above account across acid action active actual address admit adult advice afraid again
against age agent agree ahead air alarm album alert alive allow alone along already alter amber
among amount anchor angle animal ankle answer apart apple apron arch area argue arm army aroma
around arrive arrow art ask asleep aspect atlas atom attic august aunt author autumn avenue awake
award aware awful axis baby back bacon badge bag bake balance ball bamboo banana band bank bar
bark barn basic basket bath battery beach bead beam bean bear beat beauty become bed bee before
began behind belief bell belong below belt bench bend berry best better between beyond bicycle big
bill bird birth bit bitter black blade blame blanket blend bless blind block blood bloom blow blue
board boat body boil bold bolt bone bonus book boot border born borrow both bottle bottom bounce
bowl box boy brain branch brand brave bread break breeze brick bridge brief bright bring broad
broken bronze broom brother brown brush bubble bucket budget build bulb bundle burn bus bush busy
butter button buy cabin cable cactus cake calm camel camera camp canal candle candy canvas cap
capital car carbon card care cargo carpet carrot carry cart case cash castle casual cat catch
cause cave ceiling cell cement center century cereal certain chain chair chalk chance change
chapter charge chart cheap check cheese cherry chess chest chicken chief child chilly chimney
choice church cider cinema circle citizen city civil claim class clay clean clear clerk clever
climb clock close cloth cloud clover club coach coal coast coat cobalt cocoa code coffee coin cold
collar color column comb come comet common company compass cook cool copper copy coral cord cork
corn corner correct cost cotton couch count country couple course cousin cover cow crab craft
crane cream create credit crew crisp cross crowd crown crust cube culture cup curious current
curtain curve cushion custom cycle daily dairy damp dance danger daring dark data date daughter
dawn day dealer decade december decide deck deep deer degree delay deliver delta dentist depend
depth desert design desk detail device dew diamond diary dice diet differ dig dinner direct dirt
discover dish distance ditch divide dock doctor dog dollar dolphin domain door dot double dough
down dozen dragon draw dream dress drift drill drink drive drop drum dry duck due dust duty eager
eagle ear early earn earth east easy echo edge editor effort egg eight elbow elder electric
elegant ember emerald empty engine enjoy enough enter entire envelope equal error escape estate
evening event ever every exact example except exit expert extra eye fabric face fact factory fade
fair fall family famous fan farm fashion fast father fault favor feather february feel fence fern
ferry festival few fiber field fifth fig figure file fill film final find fine finger finish fire
firm first fish fit fix flag flame flash flat flavor fleet flight flint float flock floor flour
flow flower fluid flute fly foam focus fog fold follow food foot force forest forget fork form
fortune forward fossil fountain fox frame free fresh friday friend frog front frost frozen fruit
fuel full fun funny future gallery game garage garden garlic gate gather general gentle ghost
giant gift ginger girl give glad glass globe glove glow glue goat gold good goose grain grand
grape graph grass gravel gravity gray great green grid grill grocer ground group grow guard guess
guest guide guitar gulf habit hair half hall hammer hand handle happy harbor hard harvest hat have
hazel head health heart heat heavy hedge height helmet help herb hero hidden high hill history
hobby hold hollow home honest honey hood hook hope horizon horn horse hospital hotel hour house
humble hundred hungry hunt hurry ice idea idle image impact inch income index indigo indoor ink
inner inside iron island ivory ivy jacket january jar jazz jelly jewel job join joke journal
journey judge juice july jump june jungle junior just keen keep kettle key kind king kitchen kite
knee knife knock know label ladder lady lake lamp land lane language lantern large last late laugh
laundry lawn layer leader leaf learn leather leave left legend lemon length lesson letter level
library lift light lily lime limit line linen lion lip liquid list listen little live lizard lobby
local lock lodge logic long look loop loose lord lose loud love low loyal lucky lunch lung machine
magic magnet main make manager mango manual map maple marble march margin marine market marsh mask
master match material matter meadow meal mean measure meat medal meet melody melon member memory
mental menu merchant metal meter middle midnight mild mile milk mill mind mineral minor mint
minute mirror mist mix mobile model modern moment monday money monkey month moon morning mortar
mosaic moss most mother motion motor mountain mouse mouth move much mud museum music mustard myth
nail name narrow nation nature navy near neat neck need needle nest network never news next nice
night noble noise noon north nose note nothing notice novel november number nurse nut oak oasis
object ocean october odd offer office often oil old olive omega onion open opera option orange
orbit orchard order organ origin outdoor oval oven owl own oxygen oyster pace pack page paint pair
palace pale palm panel paper parade parcel park parrot part party pass past paste path patient
patrol pattern pause pay peace peach peanut pear pearl pebble pencil penny pepper perfect permit
person phone photo piano pick picnic picture piece pillow pilot pine pink pipe pitch pizza place
plain planet plant plastic plate play please plenty plot plum pocket poem poet point polar polish
pond pony pool poor popular port post pot potato pottery powder power praise present press pretty
price pride prince print prize problem proof proper proud public pull pulse pump pumpkin pupil
puppy pure purple push puzzle pyramid quarter quartz queen question quick quiet quilt quite rabbit
race radio rail rain raise ramp ranch random range rapid rare raven reach read ready real reason
recent recipe record red reef refund region relax rely remote rent repair repeat reply report
rescue result return review reward ribbon rice rich ride ridge right ring ripe river road robin
robot rock rocket role roof room root rope rose rough round route royal rubber ruby rug rule run
rural saddle safe sail salad salmon salt same sample sand satin saturday sauce save scale scarf
scene school science scout screen script sea search season seat second secret section seed seem
select senior sense september series serve session set settle shade shadow shallow shape share
sharp sheep sheet shelf shell shield shine ship shirt shoe shop shore short shoulder show shower
shut side sight sign signal silent silk silver simple since single siren sister size skill skin
skirt sky slate sleep slice slide slope slow small smart smile smoke smooth snack snail snake snow
soap social sock soda soft soil solar solid solve song soon sort soul sound soup south space spare
spark speak special speed spell spice spider spin spirit spoon sport spot spring square squash
stable stadium staff stage stair stamp stand star start state station stay steam steel stem step
stick still stone stop store storm story stove straight strange straw stream street strong student
studio study style subject submit sudden sugar suit summer sun sunday supper supply sure surface
surprise sweet swift swim switch symbol syrup system table tail take tale talent talk tall tank
tape target taste tax tea teach team tell temple ten tennis tent term test text theater theory
thick thing think third thirst thread throat thumb thunder thursday ticket tide tiger timber tiny
tip tired title toast today together token tomato tomorrow tone tool tooth top topic torch total
touch tour toward towel tower town toy track trade traffic trail train travel tray treasure tree
trend trial tribe trick trip trouble truck true trunk trust truth try tube tuesday tulip tunnel
turkey turn turtle twelve twenty twice twin type umbrella uncle under union unique unit upper
urban useful usual vacant valley value van vapor vast vault vegetable velvet vendor venue verb
verse very vessel video view village vine violet violin visit vital voice volume voyage wagon wait
walk wall walnut want warm warning wash watch water wave wax way wealth weather web wedding
wednesday week weight welcome west wet whale wheat wheel whisper white whole wide wild willow win
wind window wine wing winter wire wise wish wolf wonder wood wool word work world worth wrap wrist
write wrong yard year yellow yesterday yet yoga young youth zebra zero zinc zone
"""
_LEXICON = _LEXICON_TEXT.split()
_ONSETS = [
    "b",
    "bl",
    "br",
    "c",
    "ch",
    "cl",
    "cr",
    "d",
    "dr",
    "f",
    "fl",
    "fr",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sc",
    "sh",
    "sk",
    "sl",
    "sm",
    "sn",
    "sp",
]
_ONSETS += ["st", "str", "sw", "t", "th", "tr", "tw", "v", "w", "wh", "y", "z", "kn", "ph", "x"]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ee", "ie", "oa", "oo", "ou", "y", "ei", "au"]
_CODAS = ["", "", "", "b", "ck", "d", "ff", "g", "k", "l", "ll", "lt", "m", "mp", "n", "nd", "ng"]
_CODAS += [
    "nk",
    "nt",
    "p",
    "r",
    "rd",
    "rk",
    "rm",
    "rn",
    "rt",
    "s",
    "sh",
    "sk",
    "ss",
    "st",
    "t",
    "th",
    "x",
]
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def is_held_out(word: str) -> bool:
    """A fixed eighth of all possible words (by checksum of the lower-case form) is held out."""
    return zlib.crc32(word.lower().encode()) % 8 == 0


@lru_cache(maxsize=2)
def lexicon(split: str) -> tuple[str, ...]:
    """Real words a split may use; the commonest function words belong to both."""
    held = split == "heldout"
    return tuple(word for word in dict.fromkeys(_LEXICON) if is_held_out(word) == held)


def _pseudo(rng: Random, held: bool) -> str:
    while True:
        parts = rng.choice((1, 2, 2, 2, 3))
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(parts)
        )[:12]
        if is_held_out(word) == held:
            return word


def cased(rng: Random, word: str) -> str:
    """The word in lower case mostly, or capitalised, or in capitals."""
    draw = rng.random()
    if draw < 0.62:
        return word
    return word.capitalize() if draw < 0.87 else word.upper()


def plain_word(rng: Random, split: str) -> str:
    """One lower-case word, real or invented; held-out text holds only held-out words."""
    if rng.random() < 0.6:
        return rng.choice(lexicon(split))
    return _pseudo(rng, split == "heldout")


def number(rng: Random) -> str:
    """A number as it stands in everyday print."""
    kind = rng.randrange(8)
    if kind < 3:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind == 3:
        return price(rng)
    if kind == 4:
        return f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1990, 2031)}"
    if kind == 5:
        return f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
    if kind == 6:
        return f"{rng.randrange(1, 100)}%"
    return f"{rng.randrange(1000):03d}-{rng.randrange(10000):04d}"


def price(rng: Random, sign: str | None = None) -> str:
    """A price with two decimals, with or without a currency sign."""
    amount = f"{rng.choice((rng.uniform(0.2, 20), rng.uniform(5, 200), rng.uniform(50, 2500))):.2f}"
    return (rng.choice(("$", "$", "", "EUR ")) if sign is None else sign) + amount


def code(rng: Random) -> str:
    """A code, an address on the network, or a run of random characters."""
    kind = rng.randrange(5)
    if kind == 0:
        return "".join(rng.choices(string.ascii_uppercase + string.digits, k=rng.randint(3, 8)))
    if kind == 1:
        return "".join(rng.choices(string.ascii_letters, k=rng.randint(2, 9)))
    if kind == 2:
        return (
            f"{_pseudo(rng, False)}@{_pseudo(rng, False)}.{rng.choice(('com', 'org', 'net', 'io'))}"
        )
    if kind == 3:
        return "".join(rng.choices([chr(c) for c in range(33, 127)], k=rng.randint(2, 7)))
    return (
        f"#{rng.randrange(10**5)}"
        if rng.random() < 0.5
        else f"{_pseudo(rng, False)}_{rng.randrange(99)}"
    )


def token(rng: Random, split: str) -> str:
    """One word of running text, punctuation attached now and then."""
    draw = rng.random()
    if draw < 0.14:
        word = number(rng)
    elif draw < (0.22 if split == "train" else 0.17):
        word = code(rng)
    elif draw < 0.36:
        word = cased(rng, rng.choice(_COMMON))
    else:
        word = cased(rng, plain_word(rng, split))
    mark = rng.random()
    if mark < 0.1:
        word += rng.choice(",,,..;:!?")
    elif mark < 0.12:
        word = rng.choice(("({})", '"{}"', "'{}'", "[{}]")).format(word)
    elif mark < 0.135:
        word += rng.choice(("-", "/", "&", "+")) + plain_word(rng, split)
    return word


def phrase(rng: Random, split: str, count: int) -> str:
    """A line of count words."""
    return " ".join(token(rng, split) for _ in range(count))


def title(rng: Random, split: str, count: int) -> str:
    """A short name: capitalised words without numbers."""
    return " ".join(plain_word(rng, split).capitalize() for _ in range(count))
