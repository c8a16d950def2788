/** Options of {@link withFault} and {@link applyFault}. */
export interface FaultOptions {
  /** Accepts rules that never fire. */
  allowUnfired?: boolean;
  /** The random seed, a whole number from 0. Default: FAULT_SEED, else `fault` draws one. */
  seed?: number | string | bigint;
  /** The folder for a report: report.html, junit.xml, report.json. */
  report?: string;
  /** More options of `fault run`, such as `["--interface", "lo"]`. */
  options?: readonly string[];
}

/** Rules that are applied. */
export interface AppliedFault {
  readonly rules: readonly string[];
  /**
   * Removes the rules and returns the summary of what they did.
   *
   * @throws {FaultError} A rule never fired, `fault` ended early, or a fault that was applied later
   * is still applied.
   */
  remove(): Promise<string>;
}

/** A rule is wrong, never fired, or can't be applied. The message is one line for each rule. */
export class FaultError extends Error {
  /** The exit code of `fault`: 2 for a mistake in a rule, 120 for a rule that never fired. */
  readonly exitCode: number | null;
  /** What `fault` printed. */
  readonly output: string;
}

/**
 * Calls `fn` while the rules are applied to the traffic of this process and its descendants.
 *
 * Calls may be nested, but not overlap.
 *
 * @param rules One rule, such as `"tcp:5432 latency=200ms"`, or several.
 * @returns What `fn` returns.
 * @throws {FaultError} A rule is wrong, never fired, or can't be applied. An error of `fn` comes first.
 */
export function withFault<T>(
  rules: string | readonly string[],
  fn: () => T | Promise<T>,
  options?: FaultOptions,
): Promise<T>;

/**
 * Applies rules until `remove` is called, or this process ends: for `beforeEach` and `afterEach`.
 *
 * @throws {FaultError} A rule is wrong or can't be applied; nothing is changed.
 */
export function applyFault(
  rules: string | readonly string[],
  options?: FaultOptions,
): Promise<AppliedFault>;

/**
 * The reason why faults can't be applied here, for the test runner's `skip`; `false` where they can.
 * With FAULT_REQUIRED=1 it throws the reason instead.
 */
export function faultUnavailable(): string | false;
