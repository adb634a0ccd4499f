//! The figures as a picture: one SVG file, readable by itself, on light and dark pages.

use super::{Kind, rate_of};
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const LABEL: f64 = 300.0;
const LINE: f64 = 30.0;
const BAR: f64 = 420.0;

/// The picture as a page that needs nothing else.
pub(super) fn page(title: &str, svg: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"/><title>{title}</title>\n\
         <style>:root {{ color-scheme: light dark }} body {{ margin: 20px }} svg {{ max-width: 100%; height: auto }}</style></head>\n\
         <body>\n{svg}</body>\n</html>\n"
    )
}

/// Bars of tokens a second, each with its floor's where there is one, and of what a step's time goes to.
pub(super) fn svg(title: &str, figures: &[(String, f64, Option<f64>)], steps: &[(String, Vec<Kind>)]) -> String {
    let lines = figures.len() + steps.iter().map(|(_, kinds)| kinds.len() + 2).sum::<usize>() + 4;
    let height = LINE * lines as f64;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\">\n\
         <style>svg {{ font: 14px sans-serif; background: #fff }} text {{ fill: #222 }} .of {{ fill: #dde3ea }} .is {{ fill: #2f6db3 }}\n\
         @media (prefers-color-scheme: dark) {{ svg {{ background: #16181c }} text {{ fill: #ddd }} .of {{ fill: #353b44 }} .is {{ fill: #5b9be0 }} }}</style>\n"
    );
    let mut y = LINE;
    text(&mut out, 16.0, y, title);
    y += LINE;
    text(&mut out, 16.0, y, "Tokens a second; light: what reading the same bytes allows");
    // Each bar has its own scale: of its floor, or of the fastest figure without one.
    let most = figures.iter().filter(|(_, _, floor)| floor.is_none()).map(|(_, rate, _)| *rate).fold(0.0, f64::max);
    for (what, rate, floor) in figures {
        y += LINE;
        text(&mut out, 16.0, y, what);
        let full = floor.unwrap_or(most).max(*rate);
        if floor.is_some() {
            bar(&mut out, "of", y, 1.0);
        }
        bar(&mut out, "is", y, rate / full);
        let beside = floor.map_or(String::new(), |floor| format!(" of {}", rate_of(floor)));
        text(&mut out, LABEL + BAR + 12.0, y, &format!("{}{beside}", rate_of(*rate)));
    }
    for (step, kinds) in steps {
        y += 2.0 * LINE;
        text(&mut out, 16.0, y, &format!("Where the time of {step} goes"));
        for kind in kinds.iter().filter(|kind| kind.kernel != "total") {
            y += LINE;
            text(&mut out, 16.0, y, &format!("{} ({})", kind.kernel, kind.launches));
            bar(&mut out, "is", y, kind.share);
            let us = format!("{:.0} µs, {:.0} %", kind.seconds * 1e6, 100.0 * kind.share);
            text(&mut out, LABEL + BAR + 12.0, y, &us);
        }
    }
    out += "</svg>\n";
    out
}

fn text(out: &mut String, x: f64, y: f64, text: &str) {
    let text = escaped(text);
    writeln!(out, "<text x=\"{x}\" y=\"{y}\">{text}</text>").expect("a string takes everything");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn bar(out: &mut String, class: &str, y: f64, share: f64) {
    let (width, top) = (BAR * share.clamp(0.0, 1.0), y - 14.0);
    writeln!(out, "<rect class=\"{class}\" x=\"{LABEL}\" y=\"{top}\" width=\"{width:.1}\" height=\"18\"/>")
        .expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_whole_and_escapes_names() {
        let kind = Kind { kernel: "linear".into(), launches: 3, seconds: 1e-3, share: 0.5, bytes: 0 };
        let svg = svg(
            "a<b & c",
            &[("decode".into(), 50.0, Some(100.0)), ("prefill".into(), 7.0, None)],
            &[("x".into(), vec![kind])],
        );
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("a&lt;b &amp; c") && svg.contains("width=\"210.0\""), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 4);
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
