"""Which choice a free text settles on, and what it is worth."""

import copy
import pickle
import time

import pytest

from tests import tiny
from vpd_trl.rewards import ChoiceReward, choice_reward, extract_choice


# Text and the choice that it settles on, out of A to D; None where it settles on none
CASES = [
    # Named as the answer
    ("The answer is B because a car needs fuel.", "B"),
    ("The answer is D.", "D"),
    ("The answer is d", "D"),
    ("the answer is a.", "A"),
    ("the answer is a", "A"),
    ("The correct answer is: (C)", "C"),
    ("The correct answer is option B: copper.", "B"),
    ("The correct option is C, since the charge is conserved.", "C"),
    ("So the best choice here would be D.", "D"),
    ("The most appropriate answer to this question is therefore B.", "B"),
    ("The answer to the question is probably (A).", "A"),
    ("The answer is B. Copper conducts well; a metal has free electrons.", "B"),
    ("The answer is **C. Mitochondria**", "C"),
    ("The answer is 'B'.", "B"),
    ("The answer is “B”", "B"),
    ("The answer is [D]", "D"),
    ("The answer is B\nCopper is a metal.", "B"),
    ("The answer must be A, as only acids donate protons.", "A"),
    ("The answer's C.", "C"),
    ("The right one is D.", "D"),
    ("The correct answer, B, follows from the table.", "B"),
    ("The answer is letter C.", "C"),
    ("My final answer: B", "B"),
    ("Answer: C", "C"),
    ("answer: c", "C"),
    ("ANSWER: A", "A"),
    ("Answer - D", "D"),
    ("Answer = B", "B"),
    ("Answer:\nB", "B"),
    ("**Answer:** C", "C"),
    ("### Final Answer\n\n**B**", "B"),
    ("Answer: (b) sodium", "B"),
    ("Answer: C. It has six protons. A is wrong, B is wrong and D is wrong.", "C"),
    ("Answer: D) none of the above", "D"),
    ("Answer: B<|im_end|>", "B"),
    ("Answer: B, not C.", "B"),
    ("Ans: B", "B"),
    ("ans. c", "C"),
    ("It conducts best. Answer (C).", "C"),
    ("My response: c)", "C"),
    ("I'm leaning towards B.", "B"),
    ("We get x = 3, which matches answer choice B.", "B"),
    ("Final Answer\nB\nThank you for asking.", "B"),
    ("正确答案是B。", "B"),
    ("答案：C", "C"),
    ("Ａnswer：（B）", "B"),  # full-width forms
    # Boxes, tags, LaTeX, Markdown
    ("**A**", "A"),
    ("**C)**", "C"),
    ("**C)** The reaction is exothermic.", "C"),
    (r"\boxed{C}", "C"),
    (r"\boxed{\text{C}}", "C"),
    (r"$\boxed{\mathrm{(B)}}$", "B"),
    (r"\boxed{\textbf{D. } 5\,\text{m}}", "D"),
    (r"\fbox{B}", "B"),
    (r"Hence the answer is $\boxed{\text{A}}$.", "A"),
    (r"\(\boxed{B}\) follows since A > C.", "B"),
    (r"\boxed{A} is tempting at first. Thus \boxed{D}", "D"),
    (r"\boxed{B}, that is, \boxed{}", "B"),
    (r"The answer is C, which gives \boxed{42}.", "C"),
    (r"\boxed{A, C}", None),
    (r"\boxed{AC}", None),
    (r"\boxed{B", None),
    ("<reasoning>A looks right, yet D holds more.</reasoning><answer>D</answer>", "D"),
    ("<answer>A</answer> Wait. <answer>\nB\n</answer>", "B"),
    ("<answer>(c)</answer>", "C"),
    ("<answer>B: copper</answer>", "B"),
    ("<answer>LETTER</answer>", None),
    ("<answer>A/B/C/D</answer>", None),
    ("<answer>copper</answer>", None),
    ("`B`", "B"),
    ("~~A~~ D", "D"),
    ("<b>B</b>", "B"),
    (r"The answer is $\text{D}$", "D"),
    # Chosen, or said to be right
    ("I'd go with B.", "B"),
    ("I would choose option C", "C"),
    ("I choose A because acids do that.", "A"),
    ("I think it's D.", "D"),
    ("I pick (a).", "A"),
    ("We should therefore select B.", "B"),
    ("My guess is C.", "C"),
    ("I'll go for d", "D"),
    ("B is correct", "B"),
    ("B is the correct answer.", "B"),
    ("Option C is correct: the spring stores energy.", "C"),
    ("Therefore, option (D) is the best answer.", "D"),
    ("Only B is correct; a rock cannot fly.", "B"),
    ("That makes A the correct answer.", "A"),
    ("This leaves only D.", "D"),
    ("This corresponds to option C.", "C"),
    ("A: Incorrect, it is too small.\nB: Correct, it fits.\nC: Incorrect.\nD: Incorrect.", "B"),
    ("Option A is wrong. Option B is wrong. Option C is right. Option D is wrong.", "C"),
    ("Therefore, C.", "C"),
    ("So it must be B.", "B"),
    ("选B因为铜导电", "B"),
    ("Going with D", "D"),
    ("So B it is.", "B"),
    ("C fits the description.", "C"),
    ("B best explains this", "B"),
    # A letter, or an option, and nothing else
    ("B", "B"),
    ("b", "B"),
    ("a", "A"),
    ("(C)", "C"),
    ("C.", "C"),
    ("D)", "D"),
    (" B \n", "B"),
    ("option C", "C"),
    ("B. Copper", "B"),
    ("B) copper", "B"),
    ("(B) copper", "B"),
    ("B: copper", "B"),
    ("A. a car", "A"),
    ("C\n\nThe cell makes energy there.", "C"),
    ("B because a car needs fuel", "B"),
    ("B, since a car needs fuel", "B"),
    ("Copper is a good conductor.\n\nB", "B"),
    ("Copper is a good conductor. (B)", "B"),
    ("Copper is a good conductor.\n**B**", "B"),
    # What comes last counts
    ("The answer is B. Wait, actually it's D.", "D"),
    ("Answer: A. Hmm, no, that is wrong. Answer: C", "C"),
    ("I first thought the answer is A, but the answer is B.", "B"),
    ("B is correct. No wait, C is correct.", "C"),
    ("It's A. On second thought, it's C.", "C"),
    ("The answer is B. Let me check again: B is wrong.", None),
    ("The answer is A. Actually, it can't be A, so it must be D.", "D"),
    ("B\n\nExplanation: a car needs fuel.\n\nThe answer is C", "C"),
    # Negations, suppositions, questions, hearsay
    ("not B, the answer is D", "D"),
    ("It is not B, the answer is D.", "D"),
    ("The answer is not B. It is D.", "D"),
    ("The answer is not B.", None),
    ("The answer isn't A but D.", "D"),
    ("it can't be B", None),
    ("B is incorrect.", None),
    ("B is not correct.", None),
    ("B can't be correct", None),
    ("I wouldn't choose B.", None),
    ("I don't think the answer is B.", None),
    ("Neither A nor B is correct.", None),
    ("We can rule out A and B.", None),
    ("We can rule out A and B, so the answer is C.", "C"),
    ("If the answer is B, then the mass is negative.", None),
    ("If the answer were B, mass would be lost. Hence the answer is C.", "C"),
    ("Is the answer B?", None),
    ("Could it be B? No: the answer is A.", "A"),
    ("Many students think the answer is B.", None),
    ("The answer could be B.", None),
    ("The answer depends on whether the unit is C.", None),
    ("It is a common mistake to choose A. The answer is C.", "C"),
    ("So the answer is B?", None),
    ("The obvious choice is B, which is wrong.", None),
    ("The correct answer is option B, which is incorrect because", None),
    ("The answer is B. But I don't think the answer is B.", None),
    ("It's B. But B is wrong.", None),
    ("The answer is B. Or not: B is not possible.", None),
    ("The answer is A. But then we must rule out A.", None),
    ("The answer is A. Wait, it can't be A.", None),
    ("The answer is A. No: the answer is A or B.", None),
    # Several choices
    ("Both A and C", None),
    ("Both A and C are correct.", None),
    ("A and C are correct", None),
    ("The answer is A or B.", None),
    ("The answer is A and C.", None),
    ("The answer is either A or B.", None),
    ("The answers are B, C and D.", None),
    ("Answer: A, B", None),
    ("Answer: A/B", None),
    ("Answer: AC", None),
    ("The answer is B, A and C are wrong.", "B"),
    ("The answer is B and not C.", "B"),
    ("The answer is B, C is too small.", "B"),
    ("A is correct about mass, C is correct about charge.", None),
    # Options that are listed, and nothing chosen
    ("A: copper\nB: iron\nC: zinc\nD: gold", None),
    ("A) copper B) iron C) zinc D) gold", None),
    ("**A**: copper\n**B**: iron", None),
    ("Choices: A. copper, B. iron, C. zinc", None),
    ("Answer options: A: copper B: iron C: zinc D: gold", None),
    ("Options:\nA. copper\nB. iron\nC. zinc\nD. gold\nAnswer: B", "B"),
    ("Let us look at each option.\nA. Copper conducts.\nB. Iron conducts less.\n", None),
    # Letters that are no choices
    ("a safe choice", None),
    ("The answer is a safe choice", None),
    ("The answer is a car.", None),
    ("The answer is A car.", None),
    ("A car is the answer.", None),
    ("A good answer is to wait.", None),
    ("I think a car is right", None),
    ("vitamin C", None),
    ("The answer is vitamin C.", None),
    ("The answer is hepatitis B", None),
    ("The answer is blood type A.", None),
    ("Answer: vitamin C", None),
    ("C. elegans is a nematode.", None),
    ("The answer is C. elegans.", None),
    ("The answer is B cells.", None),
    ("The answer is B-cells.", None),
    ("The answer is D-glucose", None),
    ("The answer is C4 plants", None),
    ("The answer is A's mass", None),
    ("The answer is (D)-glucose", None),
    ("I choose option B2", None),
    ("The answer is a given set of rules", None),
    ("The answer is B and c is the speed of light.", "B"),
    ("The answer is B = 5 T.", None),
    ("The answer is A + B.", None),
    ("The answer is 20 °C.", None),
    ("The temperature is 20 C", None),
    ("Therefore, B = 3", None),
    ("We choose A as the origin.", None),
    ("Because of that, it is Better.", None),
    ("I", None),
    ("II and III", None),
    ("The answer is E.", None),
    ("copper", None),
    ("42", None),
    ("", None),
    (" \n", None),
    # Longer, as models write them
    (
        "Let's look at each option:\n\nA) Photosynthesis – in plants.\nB) Respiration – in all cells.\nC) Fermentation – "
        "without oxygen.\n\nBased on this, the correct answer is:\n\n**B) Respiration**",
        "B",
    ),
    (
        "The correct answer is **B) Respiration**.\n\nWhy the others are incorrect:\n- A) Photosynthesis is for plants.\n"
        "- C) Fermentation is anaerobic.",
        "B",
    ),
    ("The force is 10 N and the mass 2 kg, so a = 5 m/s^2. This matches option C.\n\n<answer>C</answer>", "C"),
    ("**Final Answer**\n\\[\n\\boxed{\\text{(C)}}\n\\]", "C"),
    ("A) Sodium\nB) So\nC) Na\nD) N\n\nA) Sodium\nThe correct answer is C) Na", "C"),
    ("The correct answer is B. Mitochondria (formed by the B-cell pathway) makes ATP.", "B"),
    ("B. neutron is not one of the particles mentioned. A proton has a positive charge, so it is no", None),
    ("Answer: B\nAnswer: B\nAnswer: B\nAnswer: B", "B"),
    ("The answer is D. The answer is D. The answer is", "D"),
    ("The answer is D. The answer is a", "D"),
    ("So the answer is a", None),
    ("The answer is none of the above (D).", "D"),
    ("The answer is 5 m (option B).", "B"),
    ("The answer to this problem is 5 m, which is option B.", "B"),
    ("The answer, however, is C.", "C"),
    ("The answer is B (not A).", "B"),
    ("Of the four options, only option D satisfies all conditions.", "D"),
    ("By elimination, D.", "D"),
    ("I'm not certain but B seems most plausible.", "B"),
    ("I am not sure, but I think the answer is B.", "B"),
    ("Hmm, is it A? Or B? I'd say B.", "B"),
    ("The answer is A? No, B.", "B"),
    ("The answer is B. Correction: C.", "C"),
    ("A and B are both correct, so the answer is D.", "D"),
    ("Both A and B are correct, but B is the best answer.", "B"),
    ("Statements I and II are correct, so C.", "C"),
    ("Some would choose A. I choose D.", "D"),
    ("There is no doubt that B is correct.", "B"),
    ("If you ask me, I'd say B.", "B"),
    ("While A and C are plausible, the answer is B.", "B"),
    ("The answer is B because answer A is wrong.", "B"),
    ("The best explanation for this phenomenon is option C.", "C"),
    ("因此选择C。", "C"),
    ("The answer is B.\n\nUser: What is iron?\nAssistant: The answer is A.", "B"),
    ("The answer is B.\n\n### Question 2\nWhich is a gas?\nAnswer: A", "B"),
    ("**Answer: (A)**\n\nExplanation: All bodies fall alike; (B) confuses weight with mass.", "A"),
    ("It increases (option B).", "B"),
    ("Correct choice -> C", "C"),
    ("The data are best explained by option C.", "C"),
    ("The answer is D) Both A and B", "D"),
    ("The answer is D: A and B are both correct.", "D"),
    ("The answer is neither A nor C; it's B.", "B"),
    ('```json\n{"answer": "B"}\n```', "B"),
    ("The final answer is [[D]]", "D"),
    ("[[B]]", "B"),
    # Traps
    ("The answer is: B or C depending on temperature", None),
    ("Both B and C look right. I can't decide.", None),
    ("I doubt B is correct.", None),
    ("Don't pick B.", None),
    ("To choose C would be wrong.", None),
    ("Perhaps B is correct.", None),
    ("A common answer is B, which is wrong.", None),
    ("He said the answer is B.", None),
    ("Let's assume the answer is B. Then mass is lost. So the answer is A.", "A"),
    ("I'd pick A, or maybe B", None),
    ("Answer: A & C", None),
    ("答案是A和C", None),
    ("不选B", None),
    ("The answer is B, a metal.", "B"),
    ("The answer is from A to B", None),
    ("The answer is compound A.", None),
    ("Enzyme B is the best choice.", None),
    ("Hepatitis B is correct.", None),
    ("The point A is the answer.", None),
    ("The answer lies between B and C.", None),
    ("The choice between A and B is hard.", None),
    ("The correct order is B, A.", None),
    ("As in A, the answer is zero.", None),
    ("the answer is (a copper wire)", None),
    ("The answer is $A = \\pi r^2$", None),
    ("The answer is $\\vec{B}$", None),
    ("The answer is D'", None),
    ("Answer: A → B", None),
    ("Answer: A > B", None),
    ("Answer:\n\nA) iron\nB) zinc\nC) gold", None),
    ("B: iron\nC: zinc\nD: gold", None),
    ("A: joule\nD: watt", None),
    ("A. Oxygen: plants use it.\n\nB. Carbon dioxide: this is a waste gas that is not", None),
    ("Option A: A is the donor.\n\nOption B: B is the donor. This option is wrong", None),
    ("C. rhinovirus. This answer is incorrect.", None),
    ("B. nucleotides is incorrect, as DNA is made of DNA.", None),
    ("B. Mercury is a metal, and liquid at room temperature.", "B"),
    ("There are four building blocks of DNA:\n\n   a. Nucleotides (DNA, RNA, and", None),
    ("There are four building blocks of DNA:\n\nA. Nucleotides", None),
    ("A:", None),
    ("A: I have no answer for this question.", None),
    ("A: The electronegativity of hydrogen is 2, which is more than that of chlorine and fluorine.", None),
    ("A. False\nB. True\nC. False\nD. False", None),
    ("A - no\nB - yes\nC - no", None),
    ("Option A is about light. Option B is about heat.", None),
    ("Option A: ignores friction. Option B: right.", "B"),
    ("The correct answer is 2.", None),
    ("The answer cannot be determined.", None),
    ("B?", None),
    ("A B C D", None),
    ("ABCD", None),
    ("B\nC", None),
    # Several choices, spoken of together
    ("A, B and C are wrong.", None),
    ("A, B, C are all incorrect.", None),
    ("A, C and D can be ruled out.", None),
    ("A, C, and D are all plausible.", None),
    ("None of A, B, C, or D is right.", None),
    ("None of the options A, B, C, or D is correct.", None),
    ("Not all of A, B, and C is correct.", None),
    ("Either A, or B is right.", None),
    ("I think A, B and C are wrong.", None),
    ("Wait, A, B and C are wrong.", None),
    ("A, together with B, is correct.", None),
    ("All but C is correct.", None),
    ("A, B, and D are wrong, so the answer is C.", "C"),
    ("After eliminating A, C, and D, we are left with B.", "B"),
    ("Answer: B. (A, C, and D are wrong.)", "B"),
    ("The answer is B (or C).", None),
    ("The answer is B, possibly also C.", None),
    ("The answer is B as well as C.", None),
    # Next to best, or worse
    ("The least likely answer is B.", None),
    ("The worst choice is A.", None),
    ("The second best answer is C.", None),
    ("The next best option is C.", None),
    ("The distractor answer is B.", None),
    ("The second-best option is (B).", None),
    ("The worst choice is A, and the best choice is B.", "B"),
    ("My previous answer was B.", None),
    ("Your answer is B.", None),
    ("Here is your answer: B", "B"),
    ("As a second step I choose B.", "B"),
    ("According to the second law the answer is B.", "B"),
    # Taken back in a sentence of its own
    ("The answer is B. This is incorrect.", None),
    ("The answer is B. Sorry, that is wrong.", None),
    ("The answer is A. The answer is not A.", None),
    ("The answer is A. The answer isn't A.", None),
    ("The answer is A. It isn't A.", None),
    ("The answer is B. No wait. That's wrong. D.", "D"),
    ("The answer is B. No, it isn't.", None),
    ("The answer is B. Scratch that.", None),
    ("The answer is B. Scratch that, C.", "C"),
    ("The answer is B. Sorry, I meant C.", "C"),
    ("The answer is B. On closer inspection, C is correct.", "C"),
    ("The answer is B. Let me know if that's wrong.", "B"),
    ("The answer is B. It doesn't work like a battery.", "B"),
    ("Answer: C\n\nOption A: This is incorrect.\nOption B: This is incorrect.", "C"),
    ("<answer>B</answer> Wait, that's wrong.", None),
    ("The answer is B. Not B.", None),
    ("The answer is B. It is not A.", "B"),
    ("The answer is B. Could it be A? No, that's wrong.", "B"),
    ("The answer is B. A would need more heat. That is wrong.", "B"),
    ("The answer is B. It is wrong to say that iron floats.", "B"),
    ("That is wrong. Choose B.", "B"),
    # Denied
    ("I disagree that the answer is B.", None),
    ("I reject the claim that the answer is B.", None),
    ("You said the answer is B. I disagree.", None),
    ("The obvious answer is B, which turns out to be wrong.", None),
    ("There's no reason to think the answer is B.", None),
    ("The answer is B (which is wrong).", None),
    ("The answer is B, but it's not obvious.", "B"),
    ("It is false that the answer is B.", None),
    ("We reject the null hypothesis, so the answer is B.", "B"),
    # On a condition, or in another world
    ("I'd pick A if forced, but the evidence supports C.", None),
    ("Had the question asked for the smallest, the answer would be A.", None),
    ("The answer is A if n is even and B if n is odd.", None),
    ("The answer is B if friction is ignored.", "B"),
    ("A would be correct if it were a gas.", None),
    ("If I had to choose, the answer would be B.", "B"),
    # Said of something else, or with another one in the same breath
    ("The answer is B or, more precisely, C.", "C"),
    ("The answer is A (mod n).", None),
    ("We select A from the set.", None),
    ("<answer>A. B. C.</answer>", None),
    ("<answer>A. copper B. iron</answer>", None),
    ("<answer>A. BAD</answer>", "A"),
    ("B is the answer to a different question.", None),
    # Said in few words, or of one's changed mind
    ("Correct: C", "C"),
    ("Letter: C", "C"),
    ("Solution: B", "B"),
    ("Solution: A. Compute x.", None),
    ("Correct: C. Incorrect: A, B, D.", "C"),
    ("Answer key: A", "A"),
    ("D is the better option.", "D"),
    ("C is not the correct answer; B is.", "B"),
    ("Only statement C holds.", "C"),
    ("Only statement C fails.", None),
    ("Option C: incorrect. Option D: correct.", "D"),
    ("I'm changing my answer from A to C.", "C"),
    ("I'm not changing my answer to C.", None),
    ("<answer>The answer is C</answer>", "C"),
    # Thinking is not read
    ("<think>The answer is A.</think>The answer is B.", "B"),
    ("The answer is A.</think>B", "B"),
    ("<think>The answer is A.", None),
    ("<think>The answer is A.</think>", None),
    # A model that goes on with a question of its own
    ("The answer is B.\n\nQuestion: What is iron?\nA: a metal\nAnswer: A", "B"),
    (" B\n\nQ: Which is a gas?\nAnswer: D", "B"),
    ("Question: Which is a gas?\nA: iron\nB: neon\nAnswer: B", "B"),
]


@pytest.mark.parametrize(("text", "choice"), CASES)
def test_a_text_settles_on_the_choice_that_a_reader_would_see_in_it(text, choice):
    assert extract_choice(text) == choice


def test_the_choices_are_those_that_were_given():
    assert extract_choice("The answer is E.", "ABCDE") == "E"
    assert extract_choice("The answer is J.", list("ABCDEFGHIJ")) == "J"
    assert extract_choice("The answer is C.", "AB") is None
    assert extract_choice("Answer: b", ("a", "b")) == "B"
    assert extract_choice("I think a car needs fuel, so I would wait.", "ABCDEFGHI") is None
    assert extract_choice("The answer is I.", "ABCDEFGHI") == "I"
    assert extract_choice("The answer is B if I ignore friction.", "ABCDEFGHI") == "B"
    assert extract_choice("E. coli is a bacterium.", "ABCDE") is None


def test_strict_reading_takes_the_last_answer_tag_alone():
    def strict(text):
        return extract_choice(text, strict=True)

    assert strict("<reasoning>It is A.</reasoning>\n<answer>B</answer>") == "B"
    assert strict("<answer>A</answer> no, <answer>\n C </answer>") == "C"
    assert strict("<answer>A</answer> <answer>copper</answer>") is None, "the last one counts"
    for text in ("The answer is B.", "B", r"\boxed{B}", "<answer>B", "<answer>b</answer>", "<answer>(B)</answer>"):
        assert strict(text) is None
    assert strict("<think><answer>A</answer></think>") is None
    assert strict("<answer></answer>") is None
    assert strict("<answer>AB</answer>") is None


def test_long_and_odd_texts_are_read_in_time():
    texts = ("The answer is " * 8000, "A or B, " * 12_000, "answer " * 15_000, "<answer>" * 12_000, "( " * 50_000)
    texts += ("\\text{" * 20_000, "\\boxed{" * 15_000, "\n" * 100_000, "it is A. " * 11_000, "**A" * 30_000)
    texts += ("no, wait, " * 10_000, "it would be A if it " * 5000, "not B. " * 14_000, "A, perhaps " * 9000)
    start = time.process_time()
    for text in texts:
        extract_choice(text)
    assert time.process_time() - start < 10


# ---- The reward


def test_the_right_choice_is_worth_one_and_everything_else_nothing():
    completions = ["The answer is B.", "The answer is C.", "copper"]
    assert choice_reward(completions=completions, answer=["B", "B", "B"]) == [1.0, 0.0, 0.0]
    assert choice_reward(completions, ["B", "C", "A"]) == [1.0, 1.0, 0.0]


def test_conversations_are_read_by_their_last_assistant_message():
    parts = [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is B."}]
    completions = [
        [{"role": "assistant", "content": "The answer is B."}],
        [
            {"role": "assistant", "content": "A"},
            {"role": "tool", "content": "A"},
            {"role": "assistant", "content": parts},
        ],
        [{"role": "tool", "content": "B"}],
    ]
    assert choice_reward(completions=completions, answer=["B"] * 3) == [1.0, 1.0, 0.0]


def test_reference_letters_may_be_written_in_many_ways():
    given = ["b", "(B)", "B.", " B) ", "B:"]
    assert choice_reward(completions=["B"] * 5, answer=given) == [1.0] * 5


@pytest.mark.parametrize("value", ["E", "", "AB", "copper", 1, True, ["B"], 0.5])
def test_a_reference_that_is_no_choice_is_refused_with_its_row(value):
    with pytest.raises(ValueError, match=r"needs one of the letters A, B, C, D .*row 1 of the batch has") as error:
        choice_reward(completions=["B", "B"], answer=["B", value])
    assert repr(value) in str(error.value)


def test_a_row_without_a_reference_gets_no_reward():
    assert choice_reward(completions=["B", "B", "B"], answer=["B", None, float("nan")]) == [1.0, None, None]


def test_the_answers_column_and_the_choices_can_be_others():
    reward = ChoiceReward("ABCDE", answer_column="answerKey")
    assert reward(completions=["E", "A"], answerKey=["E", "E"], answer=["A", "A"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="needs the data set's column 'answerKey'"):
        reward(completions=["E"], answer=["E"])
    with pytest.raises(ValueError, match="needs the data set's column 'answer'"):
        choice_reward(completions=["E"])


@pytest.mark.parametrize(("given", "got"), [(["B"], "1 answers"), ("BB", "'BB'")])
def test_there_must_be_one_reference_per_completion(given, got):
    with pytest.raises(ValueError, match=f"one reference answer per completion, 2 in all; got {got}"):
        choice_reward(completions=["B", "B"], answer=given)


def test_a_strict_reward_wants_the_tag():
    completions = ["The answer is B.", "<answer>B</answer>"]
    assert ChoiceReward(strict=True)(completions=completions, answer=["B", "B"]) == [0.0, 1.0]


def test_thinking_that_the_prompt_opened_is_not_read():
    completions, answer = ["so the answer is B.", "so it is A.</think>The answer is B."], ["B", "B"]
    prompts = ["Q?<think>\n"] * 2
    assert choice_reward(completions=completions, answer=answer, prompts=prompts) == [0.0, 1.0]
    assert ChoiceReward(opens_thinking=True)(completions=completions, answer=answer) == [0.0, 1.0]
    assert choice_reward(completions=completions, answer=answer, prompts=["Q?"] * 2) == [1.0, 1.0]


def test_what_was_found_is_logged():
    extra, metrics = {}, {}
    choice_reward(
        completions=["B", "copper", "C"],
        answer=["B", "B", None],
        log_extra=extra.__setitem__,
        log_metric=lambda name, value: metrics.setdefault(name, []).append(value),
    )
    assert extra == {"choice": ["B", None, "C"]}
    assert metrics == {"rewards/choice_reward/answered": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"choices": "A"}, ValueError, "at least two different letters, such as 'ABCD'; got 'A'"),
        ({"choices": "ABA"}, ValueError, "got 'ABA'"),
        ({"choices": "1234"}, ValueError, "got '1234'"),
        ({"choices": ["A", "BC"]}, ValueError, r"got \['A', 'BC'\]"),
        ({"choices": [1, 2]}, ValueError, r"got \[1, 2\]"),
        ({"strict": "yes"}, TypeError, "strict must be True or False; got 'yes'"),
        ({"opens_thinking": None}, TypeError, "opens_thinking must be True or False; got None"),
        ({"answer_column": ""}, ValueError, "answer_column must be a text that is not empty; got ''"),
        ({"name": 3}, ValueError, "name must be a text that is not empty; got 3"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_given_and_what_is_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        ChoiceReward(**arguments)


def test_the_reward_can_be_copied_and_sent_to_other_processes():
    reward = ChoiceReward("ABC", strict=True, answer_column="key", name="science")
    for copied in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
        assert copied(completions=["<answer>C</answer>"], key=["C"]) == [1.0]
        assert copied.__name__ == "science"


def test_a_trainer_takes_it_and_logs_it_by_its_name(tmp_path):
    data = tiny.dataset(n=8).map(lambda row: {"answer": "B"})
    trainer = tiny.trainer(
        tmp_path, reward_funcs=choice_reward, data=data, method="grpo", feedback_fn=None, max_steps=1
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert "rewards/choice_reward/mean" in logged
    assert 0 <= logged["rewards/choice_reward/answered"] <= 1
