//! `fourfold run`: its flags, the choice between chat, one answer and bare continuation, and the closing line.

use super::drafting::{Draft, Drafting};
use super::engine::{EngineArgs, activations_name};
use super::interrupt::Interrupt;
use super::screen::Screen;
use super::terminal::{self, Paint};
use super::{Ending, Usage, chat};
use clap::ValueEnum;
use fourfold::config::GenerationConfig;
use fourfold::sampler::Choice;
use fourfold::tokenizer::{ChatOptions, Message, Reasoning};
use fourfold::{Activations, Chat, Engine, ReplyOptions, Sampling, Session, Stats};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, Instant};

/// Longest prompt taken from stdin, in bytes: no context holds more.
const MAX_STDIN: u64 = 8 << 20;
/// What the built-in model continues where nobody gives it anything.
const STORY: &str = "Once upon a time";
/// Tokens of a bare continuation, unless asked otherwise: a text has no natural end.
const RAW_TOKENS: usize = 256;
/// How long to wait for stdin before saying that we do.
const STDIN_PATIENCE: Duration = Duration::from_secs(2);

const EXAMPLES: &str = "\
Examples:
  fourfold run                                          chat on this terminal
  fourfold run --raw \"Once upon a time\" --seed 7        continue a text; the seed repeats it
  echo \"Tell me a joke\" | fourfold run -q > joke.txt    in a pipe: the answer and nothing else
  fourfold run --model ~/models/gpt-oss-20b --reasoning high \"How many primes are below 100?\"
  fourfold run --device cpu --greedy \"Hello\"            no GPU, no chance

On a terminal without PROMPT it is a chat; /help lists its commands. Ctrl-C stops an answer, pressed again the program. \
In a pipe only the final answer is written; --show-reasoning adds the rest. Without PROMPT and with nothing on stdin, \
the built-in model continues \"Once upon a time\".";

/// Flags of `fourfold run`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// What to answer (or, with --raw, to continue) [default: a chat on a terminal, else all of stdin]
    pub(super) prompt: Option<String>,

    /// Continue PROMPT as bare text, without a chat format. What spells a control token, such as <|end|>, is one
    #[arg(long, conflicts_with_all = ["system", "reasoning", "date", "show_reasoning"])]
    pub(super) raw: bool,
    /// What the model should keep to in the whole conversation
    #[arg(long, value_name = "TEXT")]
    pub(super) system: Option<String>,
    /// How much to reason before the answer, for models that do [default: the model's own]
    #[arg(long, value_name = "EFFORT")]
    reasoning: Option<Effort>,
    /// The day that prompts call today, for models that are told [default: today, UTC]
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = date)]
    date: Option<String>,
    /// In a pipe, write all channels, each under its name
    #[arg(long)]
    show_reasoning: bool,
    /// No closing line, no progress bar, no notes: on stderr only errors
    #[arg(short, long)]
    pub(super) quiet: bool,

    #[command(flatten)]
    pub(super) drawing: Drawing,
    #[command(flatten)]
    drafting: Drafting,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
}

/// How tokens are drawn.
#[derive(clap::Args)]
#[command(next_help_heading = "Drawing tokens")]
pub(super) struct Drawing {
    /// Most tokens to generate [default: 256 with --raw, else as many as the context holds]
    #[arg(short = 'n', long, value_name = "N")]
    max_tokens: Option<usize>,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    #[command(flatten)]
    chances: Chances,
    /// Divide (or, below 0, multiply) the logits of tokens that occurred; 1 is off [default: the checkpoint's, else 1]
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f32>,
    /// Always the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed", "stream"])]
    greedy: bool,
    /// Repeat the run that had this seed [default: a new one each run; the closing line says which]
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u64>,
    /// Another conversation with the same seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    stream: u64,
    /// After a --raw text, list its tokens on stderr with log-probabilities, and the N likeliest in each place
    #[arg(long, value_name = "N", requires = "raw")]
    logprobs: Option<usize>,
}

/// Which tokens have a chance.
#[derive(clap::Args)]
pub(super) struct Chances {
    /// Logits are divided by it; 0 is greedy [default: the checkpoint's, else 1; bench: 0, or 1 beside a filter]
    #[arg(short, long, value_name = "T")]
    temperature: Option<f32>,
    /// Draw from the K likeliest tokens; 0 is off [default: the checkpoint's, else 0; bench: 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw from the likeliest tokens that together have probability P; 1 is off [default: the checkpoint's, else 1; bench: 1]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Draw from tokens at least P times as likely as the likeliest; 0 is off [default: the checkpoint's, else 0; bench: 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
}

impl Chances {
    /// The flags alone: where there are none, always the likeliest token.
    pub(super) fn alone(&self) -> Sampling {
        let any = self.top_k.is_some_and(|k| k > 0)
            || self.top_p.is_some_and(|p| p != 1.0)
            || self.min_p.is_some_and(|p| p != 0.0);
        Sampling {
            temperature: self.temperature.unwrap_or(if any { 1.0 } else { 0.0 }),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            ..Sampling::default()
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Effort {
    /// No thinking, where the model's template knows how to ask for it (Qwen3)
    Off,
    Low,
    Medium,
    High,
}

/// What a run does.
enum Task {
    Chat,
    Answer(String),
    Continue(String),
}

fn date(text: &str) -> Result<String, &'static str> {
    let is_date = fourfold::tokenizer::chat::is_date(text);
    if is_date { Ok(text.to_owned()) } else { Err("no day of the calendar as YYYY-MM-DD") }
}

pub(super) fn run(args: &Args, started: Instant) -> anyhow::Result<Ending> {
    // What is wrong with the flags alone is said before anything is loaded.
    let seed = args.drawing.seed.unwrap_or_else(new_seed);
    args.drawing.sampling(&GenerationConfig::default(), seed).validate()?;
    args.drafting.check()?;
    let device = args.engine.device()?;
    let task = args.task()?;
    let interrupt = Interrupt::install()?;
    let engine = args.engine.load(device, args.quiet)?;
    if let Some(why) = engine.fallback().filter(|_| !args.quiet) {
        terminal::note(why);
    }
    let draft = args.drafting.load(&args.engine, &engine, args.quiet)?;
    let run = Run { args, engine, draft, interrupt: &interrupt, started, seed };
    match task {
        Task::Chat => chat::chat(run),
        Task::Answer(prompt) => run.answer(&prompt),
        Task::Continue(prompt) => run.continue_text(&prompt),
    }
}

/// A run under way.
pub(super) struct Run<'a> {
    pub(super) args: &'a Args,
    pub(super) engine: Engine,
    draft: Draft,
    pub(super) interrupt: &'a Interrupt,
    pub(super) started: Instant,
    pub(super) seed: u64,
}

impl Run<'_> {
    fn session(&self) -> anyhow::Result<Session> {
        let mut session = self.engine.session()?;
        session.set_speculation(self.draft.speculation(&self.args.drafting, &self.engine)?)?;
        Ok(session)
    }

    /// An empty conversation.
    pub(super) fn new_chat(&self, system: Option<&str>) -> anyhow::Result<Chat> {
        let effort = |effort| match effort {
            Effort::Off => Reasoning::Off,
            Effort::Low => Reasoning::Low,
            Effort::Medium => Reasoning::Medium,
            Effort::High => Reasoning::High,
        };
        let options = ChatOptions { reasoning: self.args.reasoning.map(effort), date: self.args.date.clone() };
        self.engine.chat_format()?;
        let mut chat = Chat::new(self.session()?, options)?;
        if let Some(system) = system {
            chat.push(Message::new("system", system));
        }
        Ok(chat)
    }

    /// How an answer is drawn and what ends it.
    pub(super) fn reply_options(&self) -> ReplyOptions {
        let drawing = &self.args.drawing;
        ReplyOptions {
            sampling: drawing.sampling(self.engine.generation(), self.seed),
            max_tokens: drawing.max_tokens,
            stop: drawing.stop.clone(),
            stop_tokens: None,
        }
    }

    /// Stream one answer to stdout. Says what it took, when its first token came, and whether Ctrl-C stopped it.
    pub(super) fn stream(&self, chat: &mut Chat, prompt: &str) -> anyhow::Result<Streamed> {
        let cancel = chat.session().cancel_handle();
        let mut screen = Screen::new(self.args.show_reasoning);
        let mut answer = chat.ask(prompt, &self.reply_options())?;
        self.interrupt.begin(cancel);
        let mut first = None;
        let drawn = answer.by_ref().try_for_each(|piece| {
            first.get_or_insert_with(|| self.started.elapsed());
            Ok(screen.show(&piece?)?)
        });
        let interrupted = self.interrupt.end();
        screen.finish()?;
        let streamed = Streamed { stats: answer.stats(), first, interrupted, hidden_only: screen.hid_everything() };
        self.close(&streamed);
        drawn.map(|()| streamed)
    }

    fn answer(&self, prompt: &str) -> anyhow::Result<Ending> {
        let mut chat = self.new_chat(self.args.system.as_deref())?;
        let streamed = self.stream(&mut chat, prompt)?;
        if streamed.hidden_only && !self.args.quiet {
            terminal::note("the answer holds reasoning only; --show-reasoning shows it");
        }
        Ok(streamed.ending())
    }

    fn continue_text(&self, prompt: &str) -> anyhow::Result<Ending> {
        let mut options = self.reply_options();
        options.max_tokens.get_or_insert(RAW_TOKENS);
        let mut session = self.session()?;
        let cancel = session.cancel_handle();
        let mut reply = session.reply(&self.engine.text_tokens(prompt)?, &options)?;
        self.interrupt.begin(cancel);
        let paint = Paint(terminal::styled(&io::stdout()));
        let on_terminal = io::stdout().is_terminal();
        let mut out = io::stdout().lock();
        let mut write = |text: &str| {
            let text = if on_terminal { terminal::printable(text) } else { text.into() };
            out.write_all(text.as_bytes())?;
            out.flush()
        };
        write_prompt(&mut write, prompt, paint)?;
        let (mut first, mut choices) = (None, Vec::new());
        let drawn = reply.by_ref().try_for_each(|token| {
            let token = token?;
            first.get_or_insert_with(|| self.started.elapsed());
            write(&token.text)?;
            if self.args.drawing.logprobs.is_some() {
                choices.push(token.choice);
            }
            anyhow::Ok(())
        });
        let interrupted = self.interrupt.end();
        write("\n")?;
        let streamed = Streamed { stats: reply.stats(), first, interrupted, hidden_only: false };
        self.list_logprobs(&choices)?;
        self.close(&streamed);
        drawn.map(|()| streamed.ending())
    }

    fn list_logprobs(&self, choices: &[Choice]) -> anyhow::Result<()> {
        if choices.is_empty() {
            return Ok(());
        }
        let tokenizer = self.engine.tokenizer()?;
        let spelled = |id: u32| format!("{:?}", String::from_utf8_lossy(&tokenizer.token_bytes(id)));
        let place = |(id, logprob): &(u32, f32)| format!("{} {logprob:.3}", spelled(*id));
        let row = |c: &Choice| {
            let top: Vec<String> = c.top.iter().map(place).collect();
            vec![c.id.to_string(), format!("{:.4}", c.logprob), spelled(c.id), top.join("  ")]
        };
        let rows: Vec<Vec<String>> = choices.iter().map(row).collect();
        let paint = Paint(terminal::styled(&io::stderr()));
        terminal::table(&mut io::stderr().lock(), paint, &[">id", ">logprob", "token", "likeliest"], &rows)?;
        Ok(())
    }

    /// The closing line: what the answer took, who computed, and how to repeat it.
    fn close(&self, streamed: &Streamed) {
        if self.args.quiet {
            return;
        }
        let stats = &streamed.stats;
        let tokens = |n: usize, what: &str| format!("{n} {what}token{}", if n == 1 { "" } else { "s" });
        let rate = |rate: f64| if rate > 0.0 { format!(" at {}/s", significant(rate)) } else { String::new() };
        let cached = if stats.cached_tokens > 0 { format!(" ({} cached)", stats.cached_tokens) } else { String::new() };
        let mut parts = vec![
            format!("{}{cached}{}", tokens(stats.prompt_tokens, "prompt "), rate(stats.prompt_rate())),
            format!("{}{}", tokens(stats.generated_tokens, ""), rate(stats.generation_rate())),
        ];
        if let Some(first) = streamed.first {
            let after = format!("first after {:.2} s", stats.first_token.as_secs_f64());
            // In a chat the time since the start is the user's typing.
            let since = format!(" ({:.2} s after start)", first.as_secs_f64());
            parts.push(after + if streamed.is_first(self) { &since } else { "" });
        }
        parts.extend(self.draft.told(&stats.drafts));
        parts.push(self.engine.device().describe());
        let activations = self.engine.activations();
        if activations != Activations::F32 {
            parts.push(format!("activations {}", activations_name(activations)));
        }
        let sampling = self.reply_options().sampling;
        parts.push(if sampling.temperature == 0.0 { "greedy".to_owned() } else { format!("seed {}", sampling.seed) });
        if streamed.interrupted {
            parts.push("stopped".to_owned());
        }
        let paint = Paint(terminal::styled(&io::stderr()));
        // The terminal has written ^C, and no text has ended that line.
        let end = if streamed.interrupted && streamed.first.is_none() && paint.0 { "\n" } else { "" };
        let line = parts.join(" · ");
        terminal::note(&format!("{end}{}{}{}", paint.dim(), terminal::printable(&line), paint.plain()));
    }
}

/// An answer that was written to stdout.
pub(super) struct Streamed {
    stats: Stats,
    /// From the program's start to the first text.
    first: Option<Duration>,
    pub(super) interrupted: bool,
    /// There was text, but none that stdout was to get.
    hidden_only: bool,
}

impl Streamed {
    fn ending(&self) -> Ending {
        if self.interrupted { Ending::Interrupted } else { Ending::Done }
    }

    /// Whether its first token is the program's, with nothing but loading before it.
    fn is_first(&self, run: &Run<'_>) -> bool {
        run.args.raw || run.args.prompt.is_some() || !io::stdin().is_terminal() || !io::stdout().is_terminal()
    }
}

/// The prompt, dim on a terminal; what follows is the model's.
fn write_prompt(write: &mut impl FnMut(&str) -> io::Result<()>, prompt: &str, paint: Paint) -> io::Result<()> {
    if !paint.0 {
        return write(prompt);
    }
    let mut out = io::stdout().lock();
    write!(out, "{}{}{}", paint.dim(), terminal::printable(prompt), paint.plain())?;
    out.flush()
}

impl Args {
    fn task(&self) -> anyhow::Result<Task> {
        let here = io::stdin().is_terminal() && io::stdout().is_terminal();
        let prompt = match &self.prompt {
            Some(prompt) if self.is_blank(prompt) => return Err(Usage("the prompt is empty".to_owned()).into()),
            Some(prompt) => prompt.clone(),
            None if here && !self.raw => return Ok(Task::Chat),
            None if here => String::new(),
            None => read_stdin(self.quiet)?,
        };
        if !self.is_blank(&prompt) {
            return Ok(if self.raw { Task::Continue(prompt) } else { Task::Answer(prompt) });
        }
        if self.has_model() {
            return Err(Usage("there is no prompt: give one, or write it to stdin".to_owned()).into());
        }
        Ok(Task::Continue(STORY.to_owned()))
    }

    /// Whether the user named a model.
    pub(super) fn has_model(&self) -> bool {
        self.engine.has_model()
    }

    /// Nothing to answer. To a bare continuation, white space is text.
    fn is_blank(&self, prompt: &str) -> bool {
        if self.raw { prompt.is_empty() } else { prompt.trim().is_empty() }
    }
}

/// All of stdin, without the newline that ends it.
fn read_stdin(quiet: bool) -> anyhow::Result<String> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = tell.send(io::stdin().take(MAX_STDIN + 1).read_to_string(&mut text).map(|_| text));
    });
    // Someone may have left us a pipe that never ends without meaning to.
    let read = told.recv_timeout(STDIN_PATIENCE).or_else(|_| {
        if !quiet {
            terminal::note("reading the prompt from stdin, up to its end (Ctrl-D on a terminal)");
        }
        told.recv()
    });
    let text = read?.map_err(|e| Usage(format!("the prompt on stdin cannot be read: {e}")))?;
    if text.len() as u64 > MAX_STDIN {
        return Err(Usage(format!("the prompt on stdin is longer than {MAX_STDIN} bytes")).into());
    }
    Ok(text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text).to_owned())
}

impl Drawing {
    /// The flags, and where they are silent, what the checkpoint recommends.
    fn sampling(&self, generation: &GenerationConfig, seed: u64) -> Sampling {
        let recommended = if generation.do_sample == Some(false) { Some(0.0) } else { generation.temperature };
        let temperature = if self.greedy { 0.0 } else { self.chances.temperature.or(recommended).unwrap_or(1.0) };
        // The likeliest token is that of the model's own logits, unless a flag says otherwise.
        let penalty = generation.repetition_penalty.filter(|_| !self.greedy);
        Sampling {
            repetition_penalty: self.repetition_penalty.or(penalty).unwrap_or(1.0),
            temperature,
            top_k: self.chances.top_k.or(generation.top_k).unwrap_or(0),
            top_p: self.chances.top_p.or(generation.top_p).unwrap_or(1.0),
            min_p: self.chances.min_p.or(generation.min_p).unwrap_or(0.0),
            seed,
            stream: self.stream,
            top_logprobs: self.logprobs.unwrap_or(0),
        }
    }
}

/// A seed that no earlier run had, short enough to type: the standard library's hash keys come from the system.
pub(super) fn new_seed() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish() >> 32
}

/// Three digits, or all whole ones.
fn significant(x: f64) -> String {
    let decimals = if x < 10.0 { 2 } else { usize::from(x < 100.0) };
    format!("{x:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_have_three_digits() {
        assert_eq!([0.1234, 9.876, 95.23, 310.4, 12345.6].map(significant), ["0.12", "9.88", "95.2", "310", "12346"]);
    }

    #[test]
    fn seeds_are_new() {
        assert_ne!((new_seed(), new_seed()), (new_seed(), new_seed()));
    }
}
