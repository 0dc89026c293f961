// One decoded token through all layers: what LayerStep does before and after attention, and between them attention over spans
// that lie in memory and raw tokens, or over what is selected of the layer, wherever it lies; or, or beside it, what StateStep
// does. Included by bind_step.cpp alone, inside an anonymous namespace, after layer_step.h and state_step.h.
//
// Bits are those of the same steps one by one: each calls the very functions that serve alone.

// Where one layer's raw rows lie: in a ring of cells, and the sink's besides.
struct RawLayer {
    uint8_t *keys, *values, *sink_keys, *sink_values;
    int64_t cell_bytes, head_bytes, sink_head_bytes, row_bytes;  // from one to the next

    static constexpr int64_t NUMBERS = 8;

    // numbers: of all layers that attend, in ../token_step.py's order.
    static RawLayer of(const int64_t *numbers, int64_t layer) {
        const int64_t *n = numbers + layer * NUMBERS;
        return {at<uint8_t>((uintptr_t)n[0]), at<uint8_t>((uintptr_t)n[1]), at<uint8_t>((uintptr_t)n[2]), at<uint8_t>((uintptr_t)n[3]),
                n[4], n[5], n[6], n[7]};
    }
};

// Some raw rows, the same of any layer.
struct RawRows {
    int64_t slot, first, count;  // slot: of the ring, or -1: of the sink

    explicit RawRows(Reader &reader) {
        slot = reader.number();
        first = reader.number();
        count = reader.number();
    }
    RowPlace of(const RawLayer &layer) const {
        const int64_t to_row = first * layer.row_bytes, to_cell = slot * layer.cell_bytes + to_row;
        if (slot < 0) return {layer.sink_keys + to_row, layer.sink_values + to_row, layer.sink_head_bytes};
        return {layer.keys + to_cell, layer.values + to_cell, layer.head_bytes};
    }
};

// What the token sees in some of the layers.
struct View {
    int64_t first_record, num_records, visible_from, visible_to;  // visible: of the tokens of these records
    int64_t position;                                             // of the first of these tokens
    std::vector<RawRows> raw;

    explicit View(Reader &reader) {
        first_record = reader.number();
        num_records = reader.number();
        visible_from = reader.number();
        visible_to = reader.number();
        position = reader.number();
        const int64_t count = reader.number();
        if (count < 0 || count > MAX_RUNS) throw std::invalid_argument("these are not runs");
        for (int64_t i = 0; i < count; ++i) raw.emplace_back(reader);
    }
    std::vector<RawRun> runs_of(const RawLayer &layer) const {
        std::vector<RawRun> found;
        for (const RawRows &rows : raw) {
            const RowPlace place = rows.of(layer);
            found.push_back({place.keys, place.values, place.head_bytes, rows.count});
        }
        return found;
    }
};

// The numbers of ../token_step.py's TokenStep.run.
struct Token {
    std::vector<Angles> angles;
    std::vector<RawRows> places;  // where its own keys and values go
    std::vector<View> views;
    const int64_t *raw;                    // see RawLayer
    const float *inputs;                   // of each layer's own, one after the other, or null
    const float *state_before = nullptr;  // of all layers that keep one, and where those behind the token go
    float *state_after = nullptr;

    explicit Token(const std::vector<int64_t> &numbers) {
        Reader reader{numbers};
        for (int64_t i = reader.number(); i > 0; --i) {
            const float *cosines = reader.address<const float>();
            angles.push_back({cosines, reader.address<const float>()});
        }
        for (int64_t i = reader.number(); i > 0; --i) places.emplace_back(reader);
        for (int64_t i = reader.number(); i > 0; --i) views.emplace_back(reader);
        raw = reader.address<const int64_t>();
        inputs = reader.address<const float>();
        state_before = reader.address<const float>();
        state_after = reader.address<float>();
        if (reader.next != numbers.size()) throw std::invalid_argument("this is not a token");
    }
};

// Where a token leaves what its selections were: of the i-th layer that attends, chosen[i] holds their number and then the records,
// ascending, in a row of `row` numbers; figures[i] the mean and the greatest missed share of a query head, and the same of misplaced
// ones.
struct Reported {
    int64_t *chosen, row;
    double *figures;
    // Of one layer, or of none (-1), what a look at its estimates needs: queries, shares of pages left out, the log of all mass.
    int64_t looked_at;
    float *q, *shares, *log_total;
};

// Records that are in frames of memory for a while: of each number its frame, or -1, and of each frame whether it may be read.
// Nothing of it changes while no `Coming` is asked, but that frames become READY.
struct AtHand {
    const int64_t *frame_of;  // null: there is none
    const int8_t *states;
    const uint8_t *frames;
    int64_t record_bytes;

    const uint8_t *find(int64_t number) const {
        const int64_t frame = frame_of ? frame_of[number] : -1;
        if (frame < 0 || __atomic_load_n(states + frame, __ATOMIC_ACQUIRE) != READY) return nullptr;
        return frames + frame * record_bytes;
    }
};

// Some of a layer's chosen records: positions among them, ascending, and where each starts.
struct Part {
    const int64_t *positions;
    const uint8_t *const *records;
    int64_t count;
};

// Brings what was chosen of a layer where it is not all at hand. `next` gives a part, good until it is asked again; false: that
// was all.
struct Coming {
    virtual void begin(int64_t layer) = 0;
    virtual bool next(Part &part) = 0;
    virtual ~Coming() = default;
};

class TokenStep {
public:
    // states, experts, streams: of each layer, null where it keeps no state, has no experts, or one residual stream. numbers: for each
    // layer which view and which angles are its own, its key bias (an address, or 0), the number of pairs that turn it and Turns of
    // ../rope_scores.py (num_fast, the table), its output norms (an address, or 0 where all is attended), its null scores (an address,
    // or 0), and where its state begins, in floats; amplitudes: of each layer's rotation; layouts: of each layer's pages, as layout_of
    // takes them, none where it does not attend.
    TokenStep(const std::vector<const LayerStep *> &steps, const std::vector<const StateStep *> &states,
              const std::vector<const RoutedStep *> &experts, const std::vector<const AltUpStep *> &streams,
              const std::vector<int64_t> &numbers, const std::vector<double> &amplitudes,
              const std::vector<std::vector<int64_t>> &layouts, int raw_kind, int64_t records_per_span, double softcap,
              const Selection &selection)
        : raw_kind_((RawKind)raw_kind), records_per_span_(records_per_span), softcap_((float)softcap), selection_(selection) {
        Reader reader{numbers};
        const size_t count = steps.size();
        if (amplitudes.size() != count || layouts.size() != count || states.size() != count ||
            experts.size() != count || streams.size() != count)
            throw std::invalid_argument("these are not layers");
        for (size_t i = 0; i < count; ++i) {
            Layer layer{};
            layer.step = steps[i];
            layer.state = states[i];
            layer.experts = experts[i];
            layer.streams = streams[i];
            layer.attends = !layouts[i].empty();
            if (layer.attends) layer.layout = layout_of(layouts[i]);
            layer.view = reader.number();
            layer.angles = reader.number();
            layer.key_bias = reader.address<const float>();
            layer.pairs = reader.number();
            layer.num_fast = reader.number();
            layer.turns = reader.address<const float>();
            layer.output_norms = reader.address<const float>();
            layer.null_scores = reader.address<const float>();
            layer.state_offset = reader.number();
            layer.amplitude = (float)amplitudes[i];
            if (layer.pairs > 512) throw std::invalid_argument("more than 512 pairs of elements are turned");
            if (layer.key_bias && !layer.step->has_keys()) throw std::invalid_argument("there is a bias of keys, and there are no keys");
            if (layer.attends) {
                layer.query_size = layer.step->query_size();
                layer.num_rows = layer.query_size / layer.layout.head_dim;
                most_queries_ = std::max(most_queries_, layer.query_size);
            }
            if (layer.state && layer.state->num_outputs() > most_given_) most_given_ = layer.state->num_outputs();
            if (layer.streams) residual_size_ = layer.streams->streams() * layer.step->hidden_size();
            layers_.push_back(layer);
        }
        if (!most_queries_) throw std::invalid_argument("none of these layers attends");
    }

    // x (the residual of one token) through all layers, to out. scales: of queries, one for each angles. tables: for each layer that
    // attends, the addresses of three arrays: where its near records start, where its records do (0: perhaps in at_hand), and which
    // numbers at_hand knows these by.
    void run(const float *x, const std::vector<double> &scales, const std::vector<int64_t> &numbers, const uintptr_t *tables,
             const AtHand &at_hand, Coming &coming, float *out, const Reported &reported, int threads) const {
        const Token token(numbers);
        if (scales.size() != token.angles.size()) throw std::invalid_argument("these are not as many scales as angles");
        const auto queries = [&] { return std::vector<float>((size_t)most_queries_); };
        Call call{token, scales, at_hand, coming, reported, threads, queries(), queries(), queries(), {}, {}, {}};
        std::vector<float> given((size_t)most_given_), predicted((size_t)residual_size_), first((size_t)residual_size_);
        const float *inputs = token.inputs;
        int64_t number = 0;  // among the layers that attend
        for (const Layer &layer : layers_) {
            const float *mixed[2] = {nullptr, nullptr};
            int count = 0;
            if (layer.streams) {
                layer.streams->predict(x, predicted.data(), threads);
                x = predicted.data();
            }
            if (layer.attends) {
                mixed[count++] = attend(layer, number, x, tables + TABLES * number, call);
                ++number;
            }
            if (layer.state) {
                const StatePlace state = layer.state->place(token.state_before, token.state_after, layer.state_offset);
                layer.state->run(x, state, given.data(), threads);
                mixed[count++] = given.data();
            }
            float *to = layer.streams ? first.data() : out;
            layer.step->mix(x, mixed[0], mixed[1], layer.experts, to, threads);
            if (layer.streams) {
                layer.streams->correct(x, to, out, threads);
                layer.streams->end(*layer.step, out, inputs, threads);
            } else {
                layer.step->end(out, inputs, out, threads);
            }
            inputs += layer.step->input_size();
            x = out;
        }
    }

private:
    struct Layer {
        const LayerStep *step;
        const StateStep *state;
        const RoutedStep *experts;
        const AltUpStep *streams;
        bool attends;
        Layout layout;
        int64_t view, angles, pairs, num_fast, state_offset, query_size, num_rows;  // the last: heads of queries
        const float *key_bias, *turns, *output_norms, *null_scores;
        float amplitude;
    };

    // What a call works with in all layers.
    struct Call {
        const Token &token;
        const std::vector<double> &scales;
        const AtHand &at_hand;
        Coming &coming;
        const Reported &reported;
        int threads;
        std::vector<float> q, gate, attended, score_bias;
        std::vector<RowPlace> places;
        std::vector<const uint8_t *> records;
    };

    static constexpr size_t TABLES = 3;

    // Attention's output as the layer's projection takes it: good until the next layer's turn. number: of the layer among those that
    // attend.
    const float *attend(const Layer &layer, int64_t number, const float *x, const uintptr_t *table, Call &call) const {
        const Token &token = call.token;
        const Reported &reported = call.reported;
        const View &view = token.views.at((size_t)layer.view);
        const RawLayer raw = RawLayer::of(token.raw, number);
        const size_t turn = (size_t)layer.angles;
        float *q = call.q.data(), *attended = call.attended.data(), *gate = call.gate.data();
        call.places.clear();
        for (const RawRows &place : token.places) call.places.push_back(place.of(raw));
        layer.step->project_into(x, token.angles.at(turn), call.scales.at(turn), q, gate, call.places.data(),
                                 (int64_t)call.places.size(), raw_kind_, call.threads);
        const float *bias = bias_of(layer, view, q, call.score_bias, call.threads);
        const std::vector<RawRun> runs = view.runs_of(raw);
        const LayerAttend all = everything(layer, view, runs, table, q, bias);
        if (!layer.output_norms || !view.num_records) {
            attend_layer(*active, all, attended, call.threads);
            if (reported.row) reported.chosen[number * reported.row] = 0;
        } else {
            select(layer, number, all, x, table, call);
        }
        return layer.step->output(attended, gate, call.threads);
    }

    // The same over what is selected of the layer; what that was is reported.
    void select(const Layer &layer, int64_t number, const LayerAttend &all, const float *x, const uintptr_t *table, Call &call) const {
        const int threads = call.threads;
        if (all.num_records + 1 != call.reported.row) throw std::invalid_argument("there is other room than for what is chosen from");
        const Standing standing{all.raw, layer.output_norms, x, layer.step->hidden_size()};
        const SelectLayer one{standing, all.pages, all.num_records, layer.layout.page_tokens};
        selected.choose(*active, one, selection_, threads);
        int64_t *chosen = call.reported.chosen + number * call.reported.row;
        chosen[0] = (int64_t)selected.chosen.size();
        std::copy(selected.chosen.begin(), selected.chosen.end(), chosen + 1);
        const auto *in_memory = at<const uint8_t *const>(table[1]);
        const bool is_there = find_chosen(in_memory, at<const int64_t>(table[2]), call.at_hand, call.records);
        if (!is_there) call.coming.begin(number);
        selected.estimate(*active, one, threads);
        if (is_there)
            selected.attend(*active, one, nullptr, chosen[0], call.records.data(), threads);
        else
            for (Part part; call.coming.next(part);)
                selected.attend(*active, one, part.positions, part.count, part.records, threads);
        selected.finish(*active, one, call.attended.data(), threads);
        report(call.reported, number, call.q.data(), layer);
    }

    // Where the chosen records lie; false where one does not lie in memory.
    static bool find_chosen(const uint8_t *const *in_memory, const int64_t *numbers, const AtHand &at_hand,
                            std::vector<const uint8_t *> &found) {
        found.clear();
        for (const int64_t record : selected.chosen) {
            const uint8_t *at = in_memory[record] ? in_memory[record] : at_hand.find(numbers[record]);
            if (!at) return false;
            found.push_back(at);
        }
        return true;
    }

    // What a key bias adds to the scores of sealed tokens, (num_heads, tokens); null where nothing is to be added.
    const float *bias_of(const Layer &layer, const View &view, const float *q, std::vector<float> &scores, int threads) const {
        if (!layer.key_bias || !view.num_records) return nullptr;
        const int64_t rows = layer.num_rows, pairs = layer.pairs;
        const int64_t tokens = view.num_records * layer.layout.pages_per_record * layer.layout.page_tokens;
        std::vector<float> factors((size_t)(rows * (2 * pairs + 1)));
        if ((int64_t)scores.size() < rows * tokens) scores.resize((size_t)(rows * tokens));
        float *cosines = factors.data(), *sines = cosines + rows * pairs, *constant = sines + rows * pairs;
        layer.step->bias_factors(q, layer.key_bias, layer.amplitude, cosines, sines, constant);
        const RopeScores a{rows, pairs, view.position, tokens, cosines, sines, constant, layer.num_fast, layer.turns, scores.data()};
        share_out(tokens, TURN_BLOCK, rows * tokens * pairs, threads,
                  [&](int64_t begin, int64_t end) { active->rope_scores(a, begin, end); });
        return scores.data();
    }

    LayerAttend everything(const Layer &layer, const View &view, const std::vector<RawRun> &runs, const uintptr_t *table, const float *q,
                           const float *bias) const {
        const Layout &l = layer.layout;
        const int64_t rows = layer.num_rows / l.kv_heads, count = view.num_records, tokens = count * l.pages_per_record * l.page_tokens;
        return {{l, rows, tokens, view.visible_from, view.visible_to, q, bias, softcap_,
                 at<const uint8_t *const>(table[0]) + view.first_record, at<const uint8_t *const>(table[1]) + view.first_record},
                count,
                records_per_span_,
                {raw_kind_, l.kv_heads, l.head_dim, rows, q, softcap_, runs.data(), (int64_t)runs.size(), layer.null_scores,
                 l.value_first()}};
    }

    void report(const Reported &to, int64_t number, const float *q, const Layer &layer) const {
        const Layout &l = layer.layout;
        const int64_t rows = layer.num_rows;
        selected.figures(rows, to.figures + number * 4);
        if (number != to.looked_at) return;
        std::memcpy(to.q, q, (size_t)(rows * l.head_dim) * 4);
        selected.left_out(rows, (to.row - 1) * l.pages_per_record, to.shares, to.log_total);
    }

    RawKind raw_kind_;
    int64_t records_per_span_;
    float softcap_;
    Selection selection_;
    std::vector<Layer> layers_;
    int64_t most_queries_ = 0, most_given_ = 0;  // numbers of a layer's queries, and of what states give
    int64_t residual_size_ = 0;                  // of all streams; 0: there is one
    // Of the calling thread: a step may run in several.
    static thread_local LayerSelection selected;
};
thread_local LayerSelection TokenStep::selected;
