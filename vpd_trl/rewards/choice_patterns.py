"""What people write around the choice that they settle on, as patterns: for `choice_text`, which reads with them."""

from __future__ import annotations

import re


# Letters and digits go on with a word, but for scripts written without spaces: in "选B因为" the B stands alone
_WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"

# ---- What may stand around a letter

_BECAUSE = "because|since|as|due|but|if|which|where"
_GOES_ON = (
    f"(?:{_BECAUSE}|and|or|nor|not|for|so|when|while|although|though|rather than|instead|here|by|according|from|with|"
    "on|in|at|given|based|that|again|therefore|thus|hence|then|I)"
)
_SPECIES = (
    "elegans|coli|subtilis|cereus|anthracis|thuringiensis|pertussis|melanogaster|rerio|difficile|botulinum|tetani|"
    "perfringens|albicans|jejuni|burgdorferi|diphtheriae|trachomatis|neoformans|discoideum|rapa|oleracea|napus|"
    "thaliana|tumefaciens|aegypti|gambiae|fumigatus|niger|nidulans|baumannii|mellifera|taurus|familiaris|reinhardtii"
)
_STOP = (
    rf"\s*(?:$|</answer>|\((?<=\s\()(?!mod\b)|[\n,;:!?)\]\"—–…。、\u3400-\u9fff]|\.(?!\w)(?!\s*(?:{_SPECIES})\b)|-\s)"
)
ATTACHED = re.compile(rf"{_WORD}|[°^=+*/']|-\w|\s*[=+^]|\s*-\s*\d")
ENDED = re.compile(rf"{_STOP}|\s+{_GOES_ON}\b(?!-)")
# "A" and "I" are words, too: "a because" can't go on with a noun, "a not too simple one" can
ENDED_ARTICLE = re.compile(rf"{_STOP}|\s+(?:{_BECAUSE}|and|or|nor|for|by|from|with|in|at|here|instead)\b(?!-)")
VERB = re.compile(r"\s+(?:is|are|was|were|can|cannot|can't|has|have|does|do|would|isn't|aren't|don't|doesn't)\b")
SUBJECT_AFTER = re.compile(
    r"(?:^|[.,;:!?()\n\"]|<answer>|\b(?:so|therefore|thus|hence|that|then|and|or|nor|but|only|only statement|because|"
    r"since|clearly|both|neither|either|think|believe|means|conclude|say|wait|actually|no|if|is|makes?|making|while|"
    r"although))\s*$",
    re.IGNORECASE,
)

# ---- What the clause before takes back or leaves open

CLAUSE_END = re.compile(
    r"[.,;:!?()\n—–]|(?<!\ball )(?<!thing )\bbut\b|\b(?:so|because|and|however|thus|hence|therefore|then|while|"
    r"although)\b",
    re.IGNORECASE,
)
NEGATED = re.compile(
    r"\b(?:not|never|neither|nor|cannot|hardly|unlikely|no (?:way|evidence|reason)|impossible|wrong|"
    r"incorrect|false that|disagree|deny|dispute|refuse|fail|nobody|no one|reject\w* (?:the|that|this|any))\b|n't\b|"
    r"(?<!no )\bdoubt\b",
    re.IGNORECASE,
)
LEFT_OPEN = re.compile(
    r"\b(?:if|whether|suppos\w+|assum\w+|unless|imagine|could|might|may|maybe|perhaps|possibly|some|many|others?|"
    r"people|students?|someone|they|common|mistake\w*|tempt\w+|trap|misconception|wrongly|incorrectly|first thought|"
    r"(?:you|he|she|user|student|teacher|friend|author) (?:says?|said|thinks?|thought|claims?|claimed)|"
    r"(?:all|everything|anything) (?:but|except))\b",
    re.IGNORECASE,
)
# "Had it been larger, the answer would be B", but "if I had to choose, I'd say B"
WOULD = re.compile(r"\bwould\b|'d\b", re.IGNORECASE)
_UNREAL_IF = r"if (?!I |you )[^.!?\n]{0,200}\b(?:were|had|was|asked)\b"
UNREAL_BEFORE = re.compile(rf"(?:^|[.!?;\n] ?)(?:(?:had|were) (?!I )|{_UNREAL_IF})[^.!?\n]*$", re.IGNORECASE)
UNREAL_AFTER = re.compile(rf",? (?:only )?{_UNREAL_IF}", re.IGNORECASE)
THEN_DENIED = re.compile(
    r" \((?:incorrect|wrong)\b"
    r"|,? \(?(?:but|which) (?:is|that is|that's|this is|would be) (?:not|wrong|incorrect|false)\b"
    r"|,? (?:but|which|though|although) (?:(?:that|this|it)(?:'s| is| was)|is|was|(?:turns|turned) out(?: to be)?|"
    r"(?:proves|proved)(?: to be)?) (?:wrong|incorrect|false|not (?:it|correct|right|true|possible))\b"
)
_TAKEN_BACK = (
    r"(?:(?:this|that|it|(?:my|the|this|that) (?:answer|choice|option))(?: is|'s| was)(?: (?!not\b)\w+)? "
    r"(?:wrong|incorrect|a mistake|not (?:it|correct|right))"
    r"|(?:this|that|it) (?:isn't|wasn't|can't be|cannot be) (?:it|correct|right)"
    r"|(?:this|that|it) (?:doesn't|does not) (?:work|fit|hold|make sense)"
    r"|I(?:'m| am| was) (?:wrong|mistaken)|I disagree|I made (?:a mistake|an error)|I take (?:that|it) back"
    r"|(?:scratch|forget|strike) that|never ?mind|(?:just|I'm) (?:kidding|joking)"
    r"|(?:no|wait),? (?:no|it isn't|it's not|it is not)(?! \w))"
    rf"(?=\s*(?:$|[.,;:!)\n]|(?:{_BECAUSE})\b))"
)
_SELF_CORRECTION = r"(?:(?:no|wait|sorry|oops|hmm|hold on)\b[,.:;!…]* ?)"
THEN_TAKEN_BACK = re.compile(
    rf"(?:(?:[^.!?\n]|\.(?=\d)){{0,200}}[.!\n] ?| ?)(?:{_SELF_CORRECTION}|(?:but|however|actually),? )*{_TAKEN_BACK}",
    re.IGNORECASE,
)
ALL_TAKEN_BACK = re.compile(rf"(?:^|[.!\n] ?|</answer> ){_SELF_CORRECTION}+{_TAKEN_BACK}", re.IGNORECASE)
ON_CONDITION = re.compile(r",? (?:only )?(?:if|unless|provided)\b")
CALLED_WRONG = re.compile(
    r"[.:)\]]?[ –—-]*(?:this |the )?(?:it's |(?:(?:it|answer|option|choice) )?is )?(?:not|no|incorrect|wrong|false)\b"
    r"|[.:)\]]?[^.!?\n]*\bis (?:incorrect|wrong|false|not (?:one|the|correct|right))\b"
    r"|[.:)][^.!?\n]*[.!?:] ?this (?:answer|option|choice) is (?:incorrect|wrong)",
    re.IGNORECASE,
)
# "I think A, B and C are wrong", but "the answer is B, A and C are wrong"
OPENS_SENTENCE = re.compile(
    r"\b(?:think|believe|guess|say|conclude|that|wait|actually|correction|sorry|no)[,:;]? [(\[{\"']?$", re.IGNORECASE
)
REASONED = re.compile(r"\b(?:wrong|incorrect|because|since|not)\b|n't\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?\n]")
CORRECTS = re.compile(
    r"\b(?:wait|actually|correction|sorry|on second thought|reconsider|reflection|closer (?:look|inspection)|rather|"
    r"instead)\b|\bno[,.!:]",
    re.IGNORECASE,
)

# ---- Statements; {M} is a mention of a choice, and spaces stand for any white space

_SURELY = (
    r"(?: ?(?:therefore|thus|then|hence|probably|most likely|likely|clearly|definitely|surely|certainly|actually|"
    r"indeed|obviously|simply|still|again|in fact|either|both|:|,))*"
)
_COPULA = r"(?: (?:is|was|are)|'s| (?:must|should|would|will|has to|have to|seems to|appears to) be)\b"
_ABOUT = (
    r"(?: (?:to|of|for|in|on|from|among|with|the|this|that|these|those|above|below|given|following|question|problem|"
    r"options?|choices?|case|here|I|I'd|we|would|choose|select|pick|based|context|scenario|passage|text|my|your|"
    r"provided|listed|therefore|thus|then|now|most|likely|best|fits|matches|one|\d+)){0,8}?"
    r"(?:, (?:however|therefore|then|thus|of course|in my opinion|in this case|I think|I believe),)?"
)
_GOOD = r"(?:most )?(?:correct|right|best|better|final|only|remaining|appropriate|accurate|suitable|likely|single)"
_PICKED = (
    rf"(?:answers?|ans|choices?|options?|selection|pick|guess|{_GOOD} (?:\w+ )?(?:one|statement|letter|alternative|"
    r"explanation|description|response|solution|conclusion))"
)
# "The second best answer", "your answer"
ANOTHER = re.compile(
    r"\b(?:least|worst|poorest|weakest|bad|second|third|next|runner-up|alternative|opposite|distractor|decoy|"
    r"eliminated|rejected|excluded|previous|initial|original|earlier|(?<!is )your|his|her|their)"
    r"(?:[ -](?!the\b|my\b)\w+(?:'s)?){0,2}[ -]?$",
    re.IGNORECASE,
)
NAMES_ANSWER = re.compile(rf"{_PICKED}\b|{_GOOD}\b|most\b", re.IGNORECASE)
_CHOOSING = (
    r"(?:choose|chose|select|selected|pick|picked|choosing|selecting|go with|going with|go for|going for|opt for|"
    r"settle on|switch to|switching to|change to|changing to|say|guess|think|believe|answer|vote for|conclude|"
    r"stick with|lean towards?|leaning towards?)"
)
# "We choose A as the origin", "A from the set"
_NO_ROLE = (
    rf"(?! as (?:the|an?|our|my) (?!(?:{_GOOD} )*(?:answer|choice|option)\b)"
    r"| from (?:the|an?|our|this) (?!(?:\w+ )?(?:options|choices|answers|alternatives|list)\b)"
    r"| (?:at random|so that|such that|to be)\b)"
)

COMMITS = (
    rf"\b{_PICKED}{_ABOUT}{_COPULA}{_SURELY} ?\n?{{M}}",
    r"\b(?:answer|ans|choice|option|selection|pick|guess|response)\"?(?: to (?:the|this) question)?"
    r"(?: ?(?:[-=]+>|[:=–—→-]) ?\n?){M}",
    r"(?:^|\n)(?:(?:my|the|final|correct) )*answer\n{M}",
    r"(?:^|\n)(?:(?:the|correct|final|answer|option) )*(?:correct|letter|answer key): {M}",
    r"(?:^|\n)solution: {M}(?=\.?(?:\n|$))",
    r"\b(?:answer|option|choice), {M}(?=,)",
    r"\bans\. {M}",
    r"(?:^|[.;:\n] ?)(?:(?:my|the|final|correct) )*answer (?=[(\[]){M}(?=[.\n]|$)",
    # "The answer is 5 m, which is option B"
    rf"\b{_PICKED}{_ABOUT}{_COPULA} (?!not\b)[^.,!?\n()]{{1,80}}?(?:,? (?:which is|that is,?|i\.e\.,?|namely,?))? ?"
    r"\(?{N}",
    rf"{{S}}{_COPULA}{_SURELY} (?:the |my |our )?(?:{_GOOD} )*(?:answer|choice|option|one|response|pick)\b"
    r"(?! (?:to|for|of|in) (?:an?|another|the (?:other|previous|next|wrong))\b)",
    r"(?:n't|\bnot) (?:[^.,;!?\n]{0,30} )?(?:answer|option|choice|correct|right|best|\(?[A-Z]\)?)[,;.]? "
    r"(?:but )?{S} is(?= ?(?:[.!;\n]|$))",
    r"\b(?:I|we)(?:'d|'ll|'m| am| would| will| should| must| can)?"
    r"(?: (?:therefore|thus|probably|rather|still|now|then|definitely|have to|going to))*"
    rf" {_CHOOSING}(?: (?:that|it's|it is|it must be|it has to be))*:? {{M}}{_NO_ROLE}",
    rf"(?:^|[.,;:\n] ?|\bso )(?:choose|select|pick|go(?:ing)? with|choosing) {{M}}{_NO_ROLE}",
    r"\b(?:so|then),? {S} it is\b",
    r"\b(?:wait|actually|correction|sorry|no|I mean|I meant|scratch that|on second thought|on reflection)[,:;] {M}",
    r"\bactually {M}(?= ?(?:[.!\n]|$))",
    r"\b(?:wait|actually|sorry|oops|no)[,.:;!] I mean(?:t)? {M}",
    r"\bor,? (?:rather|better|more \w+),? {M}",
    r"\b(?:chang|switch|revis)\w* (?:my|the) (?:\w+ )?(?:answer|choice|pick|guess|selection) "
    r"(?:from (?:option )?\(?[A-Z]\)? )?to {M}",
    rf"\b(?:{_GOOD}|most \w+) \w+(?: [\w-]+){{0,6}}?{_COPULA}{_SURELY} {{N}}",
    rf"\bmak(?:es|ing) {{S}} (?:the|our|my) (?:{_GOOD} )*(?:answer|choice|option)\b",
    r"(?:\bnot|n't) (?:option )?\(?[A-Z]\)?,? but (?:rather )?{M}",
    r"(?:答案|选项)(?:应该)?(?:是|为|选|:)? ?{M}",
    r"(?<!不)选择? ?{M}",
)
TAKES_BACK = (
    r"{S} (?:is|was|can|could|would|must|should|does|do)(?: not|n't|not)\b",
    r"{S} (?:is|was)(?: \w+)? (?:incorrect|wrong|false|ruled out|eliminated|out|impossible)\b",
    r"\b(?:rul(?:e|es|ed|ing)|eliminat(?:e|es|ed|ing)|exclude|discard|reject)(?: out)? {M}",
    r"(?:n't|\bnot|cannot)(?: be)? {M}",
)
HINTS = (
    rf"{{S}}{_COPULA}{_SURELY} (?:the )?(?:most )?(?:correct|right)\b",
    rf"\b(?:it|that|this){_COPULA}{_SURELY} {{M}}",
    r"(?:\b(?:so|therefore|thus|hence|by elimination|i\.e\.)|(?<!\b[A-Z])(?<!\b[A-Z] )(?:[∴→⇒]|=>))[,:]? ?"
    r"{M}(?=\s*[.!]?\s*(?:\n|$))",
    r"\b(?:corresponds? to|match(?:es)?|leads? to|points? to|which is|namely|given by|described by) (?:only )?{N}",
    r"\b(?:(?:leaves?|leaving)(?: us)?(?: with)?|left with)(?: only)? {M}",
    r"\bonly (?:statement )?{S} (?!(?:(?:is|was|does|do|can|could|has)(?:n't|not| not)?|"
    r"fails|violates|contradicts|lacks|differs|ignores)\b)\w",
    r"{S} (?:(?:best|correctly|most \w+) \w+|fits|matches|works|makes (?:the most |most )?sense)\b",
    r"{S} (?:seems|looks|sounds|appears)(?: to be)?(?: the)?(?: most)?"
    r" (?:right|correct|best|plausible|likely|reasonable)\b",
    r"\b(?:best|correctly|most \w+) \w+ by {N}",
    r"\((?=(?:option|choice|answer)\b){M}[.!]?\Z",
    r"(?:^|\n|[.;] ?){M} ?[:.)–-] ?(?:this is |it is |it's )?(?:the )?(?:correct|right)\b",
)
# Nothing but a choice, or a choice and its text
BARE = (
    r"\A{M}",
    r"\n{M}(?:[.:)] [^\n]*|[.)])?\Z",
    r"[.!?:] (?=[(\[]){M}\.?\Z",
    r"(?<!\b[A-Z])[.!] {M}\.\Z",
)
