//! Drawing on the device: the likeliest token of a step becomes the row of the next one there, the host submits ahead and
//! reads behind.

use crate::device::Later;
use crate::engine::{Session, write_rows};
use crate::error::{Error, Result};
use crate::ops::{Drawn, Row};
use crate::sampler::Choice;
use crate::tokenizer::TokenId;
use std::collections::VecDeque;

/// Tokens that are being drawn.
#[derive(Debug)]
pub(crate) struct Ahead {
    /// The token drawn last, which the conversation does not hold yet.
    last: Option<TokenId>,
    /// Drawn, and not yet looked at.
    under_way: VecDeque<Box<dyn Later>>,
    /// Where the next step writes.
    position: usize,
}

impl Session {
    /// Begin to draw after the tokens that were fed last, whose logits were computed (`Want::Last`).
    pub(crate) fn begin_drawing(&mut self) -> Result<()> {
        let (position, s) = (self.tokens.len(), &self.state);
        let device = self.engine.device().clone();
        // `draw` puts the token here and moves on by one position.
        write_rows(&device, s, &[Row { token: 0, sequence: 0, position: position as u32 - 1, pad: 0 }])?;
        device.run(&self.engine.model().draw(1, s))?;
        let under_way = VecDeque::from([device.read_later(s.drawn.head(size_of::<Drawn>() as u64))?]);
        self.ahead = Some(Ahead { last: None, under_way, position });
        Ok(())
    }

    /// The next token, while up to `more` tokens after it are computed on the device.
    pub(crate) fn draw(&mut self, more: usize) -> Result<Choice> {
        let device = self.engine.device().clone();
        let context = self.engine.context();
        let mut ahead = self.ahead.take().expect("begin_drawing comes first");
        let wanted = 1 + more.min(device.ahead());
        while ahead.under_way.len() < wanted && (ahead.under_way.is_empty() || ahead.position < context) {
            if ahead.position >= context {
                let limit = self.engine.config().max_position_embeddings;
                return Err(Error::ContextFull { context, tokens: ahead.position + 1, limit });
            }
            ahead.position += 1;
            self.written = self.written.max(ahead.position);
            device.run(self.decode_program(1, ahead.position as u32))?;
            ahead.under_way.push_back(device.read_later(self.state.drawn.head(size_of::<Drawn>() as u64))?);
        }
        let bytes = ahead.under_way.pop_front().expect("one was asked for").get()?;
        let drawn: Drawn = bytemuck::pod_read_unaligned(&bytes);
        let choice = choice(&drawn)?;
        // The step that gave this token held the one before it.
        self.tokens.extend(ahead.last.replace(choice.id));
        self.ahead = Some(ahead);
        Ok(choice)
    }
}

/// The token of a row, or why there is none.
pub(crate) fn choice(drawn: &Drawn) -> Result<Choice> {
    let refuse = |what: &str| Err(Error::Device(format!("the logits {what}: a kernel or the checkpoint is at fault")));
    if drawn.bad != 0 {
        return refuse("contain NaN or infinity");
    }
    if drawn.sum.is_nan() || drawn.sum <= 0.0 {
        return refuse("leave no token to choose");
    }
    Ok(Choice { id: drawn.id, logprob: -drawn.sum.ln(), top: Vec::new() })
}
