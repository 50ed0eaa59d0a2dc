"""What a user might say after a good reply and after a bad one: ten statements of praise and ten complaints in each of six categories.

The categories are those of FLR (arXiv 2409.13948); the statements are prefopt's own. In each category both sides are equally long, within
a word on average.
"""

from __future__ import annotations

# category -> (praise, complaints)
STATEMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "understanding": (
        ("Yes, that is what I meant.", "You understood my question perfectly.", "You got exactly what I was asking for.",
         "That is precisely what I wanted to know.", "You read my mind, this is what I meant.",
         "Great, you caught the point of my question.", "You clearly understood what I need.", "Right, you followed me completely.",
         "You saw at once what I was getting at.", "I feel well understood, thank you."),
        ("No, that is not what I meant.", "You misunderstood my question completely.", "You did not get what I was asking for.",
         "That is not at all what I wanted to know.", "You lost me, this is not what I meant.",
         "Sorry, you missed the point of my question.", "You clearly misread what I need.", "Wrong, you did not follow me.",
         "You did not see what I was getting at.", "I do not feel understood, sorry."),
    ),
    "relevance": (
        ("This is exactly on topic, thanks.", "That fits my question very well.", "Everything you say here matters to my question.",
         "You stayed right on the subject.", "That is directly relevant to what I asked.", "This is about just what I asked you.",
         "Good, you went straight to the matter.", "All of this helps with my question.", "You kept to the point, I like that.",
         "That really belongs to what I asked."),
        ("This is completely off topic, sorry.", "That does not fit my question at all.", "Nothing you say here matters to my question.",
         "You wandered off the subject.", "That is not relevant to what I asked.", "This is not about what I asked you.",
         "Hm, you went away from the matter.", "None of this helps with my question.", "You did not keep to the point, sadly.",
         "That has nothing to do with what I asked."),
    ),
    "correctness": (
        ("That is correct, thank you.", "I checked it, and you are right.", "Everything in your answer is true.",
         "Your facts are accurate.", "That agrees with what I know.", "Good, there is no mistake in it.",
         "I can rely on this answer.", "Your reasoning holds up.", "Yes, this is right in every detail.", "It works just as you said."),
        ("That is wrong, I am afraid.", "I checked it, and you are wrong.", "Much in your answer is not true.",
         "Your facts are not accurate.", "That contradicts what I know.", "Sorry, there are mistakes in it.",
         "I cannot rely on this answer.", "Your reasoning does not hold up.", "No, this is wrong in several details.",
         "It does not work as you said."),
    ),
    "engagingness": (
        ("I love talking with you about this.", "That was fun to read.", "How interesting, tell me more!",
         "You made me curious, please go on.", "I could listen to this all day.", "What a lively answer!",
         "I really enjoyed your answer.", "You have a nice way of saying things.", "Great, let us keep talking.",
         "This conversation is a pleasure."),
        ("I do not like talking with you about this.", "That was dull to read.", "How boring, please stop it!",
         "You lost my interest, leave it.", "I cannot listen to this any longer.", "What a lifeless answer!",
         "I did not enjoy your answer.", "You have a dry way of saying things.", "Fine, let us stop talking.",
         "This conversation is a bore."),
    ),
    "informativeness": (
        ("I learned a lot from this.", "That was very informative.", "You gave me all the details I need.",
         "Thanks, that tells me a lot.", "Now I know much more than before.", "Your explanation is clear and complete.",
         "That was full of useful facts.", "The examples helped me a great deal.", "You answered more than I hoped for.",
         "This explains everything, thank you."),
        ("I learned nothing from this.", "That was not informative.", "You left out the details I need.",
         "Well, that tells me nothing.", "Now I know no more than before.", "Your explanation is vague and incomplete.",
         "That was empty of useful facts.", "I miss examples that could help me.", "You answered less than I hoped for.",
         "This explains nothing, I am afraid."),
    ),
    "instruction following": (
        ("You did just what I asked you to do.", "You followed my instructions exactly.", "Great, that is the format I wanted.",
         "You kept to everything I asked for.", "Perfect, you left nothing out.", "That is done as I told you.",
         "You respected all of my conditions.", "Every step I asked for is there.", "Thanks for doing it my way.",
         "You stuck to the task."),
        ("You did not do what I asked you to do.", "You ignored my instructions.", "Sorry, that is not the format I wanted.",
         "You did not keep to what I asked for.", "No, you left out half of it.", "That is not done as I told you.",
         "You broke some of my conditions.", "Some steps I asked for are missing.", "Why did you not do it my way?",
         "You did not stick to the task."),
    ),
}
