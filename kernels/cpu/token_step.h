// One decoded token through all layers: what LayerStep does before and after attention, and attention over spans that lie in
// memory and raw tokens between. Included by bind_step.cpp alone, inside an anonymous namespace, after layer_step.h.
//
// Bits are those of the same steps one by one: each calls the very functions that serve alone.

// Places of a sequence are given for the first layer, with the bytes from layer to layer.
struct LayeredPlace {
    RowPlace of_first;
    int64_t layer_bytes;

    RowPlace of(int64_t layer) const {
        return {of_first.keys + layer * layer_bytes, of_first.values + layer * layer_bytes, of_first.head_bytes};
    }
};

inline LayeredPlace read_place(Reader &reader) {
    LayeredPlace place;
    place.of_first.keys = const_cast<uint8_t *>(reader.address<uint8_t>());
    place.of_first.values = const_cast<uint8_t *>(reader.address<uint8_t>());
    place.of_first.head_bytes = reader.number();
    place.layer_bytes = reader.number();
    return place;
}

// What the token sees in layers with one and the same window.
struct View {
    struct Run {
        LayeredPlace place;
        int64_t tokens;
    };
    int64_t first_record, num_records, visible_from, visible_to;  // visible: of the tokens of these records
    int64_t position;                                             // of the first of these tokens
    std::vector<Run> runs;

    explicit View(Reader &reader) {
        first_record = reader.number();
        num_records = reader.number();
        visible_from = reader.number();
        visible_to = reader.number();
        position = reader.number();
        const int64_t count = reader.number();
        if (count < 0 || count > MAX_RUNS) throw std::invalid_argument("these are not runs");
        for (int64_t i = 0; i < count; ++i) {
            const LayeredPlace place = read_place(reader);
            runs.push_back({place, reader.number()});
        }
    }
    std::vector<RawRun> runs_of(int64_t layer) const {
        std::vector<RawRun> found;
        for (const Run &run : runs) {
            const RowPlace place = run.place.of(layer);
            found.push_back({place.keys, place.values, place.head_bytes, run.tokens});
        }
        return found;
    }
};

// The numbers of ../token_step.py's TokenStep.run.
struct Token {
    std::vector<Angles> angles;
    std::vector<LayeredPlace> places;
    std::vector<View> views;

    explicit Token(const std::vector<int64_t> &numbers) {
        Reader reader{numbers};
        for (int64_t i = reader.number(); i > 0; --i) {
            const float *cosines = reader.address<float>();
            angles.push_back({cosines, reader.address<float>()});
        }
        for (int64_t i = reader.number(); i > 0; --i) places.push_back(read_place(reader));
        for (int64_t i = reader.number(); i > 0; --i) views.emplace_back(reader);
        if (reader.next != numbers.size()) throw std::invalid_argument("this is not a token");
    }
};

class TokenStep {
public:
    // numbers: for each layer which view and which angles are its own, its key bias (an address, or 0), and the frequencies
    // (pairs) and their count that turn it; amplitudes: of each layer's rotation. layout: as layout_of takes it.
    TokenStep(const std::vector<const LayerStep *> &steps, const std::vector<int64_t> &numbers, const std::vector<double> &amplitudes,
              const std::vector<int64_t> &layout, int raw_kind, int64_t records_per_span, double softcap)
        : layout_(layout_of(layout)), raw_kind_((RawKind)raw_kind), records_per_span_(records_per_span), softcap_((float)softcap) {
        Reader reader{numbers};
        if (steps.empty() || amplitudes.size() != steps.size()) throw std::invalid_argument("these are not layers");
        for (size_t i = 0; i < steps.size(); ++i) {
            Layer layer;
            layer.step = steps[i];
            layer.view = reader.number();
            layer.angles = reader.number();
            layer.key_bias = reader.address<float>();
            layer.frequencies = reader.address<float>();
            layer.pairs = reader.number();
            layer.amplitude = (float)amplitudes[i];
            if (layer.pairs > 512) throw std::invalid_argument("more than 512 pairs of elements are turned");
            layers_.push_back(layer);
        }
    }

    // x (hidden_size) through all layers, to out. tables: for each layer, the addresses of two arrays: where its near records
    // start and where its records do.
    void run(const float *x, double scale, const std::vector<int64_t> &numbers, const uintptr_t *tables, float *out, int threads) const {
        const Token token(numbers);
        const int64_t heads = layers_[0].step->query_size();
        std::vector<float> q((size_t)heads), attended((size_t)heads), score_bias;
        std::vector<RowPlace> places(token.places.size());
        for (size_t i = 0; i < layers_.size(); ++i, x = out) {
            const Layer &layer = layers_[i];
            const View &view = token.views.at((size_t)layer.view);
            for (size_t p = 0; p < places.size(); ++p) places[p] = token.places[p].of((int64_t)i);
            layer.step->project_into(x, token.angles.at((size_t)layer.angles), scale, q.data(), places.data(),
                                     (int64_t)places.size(), raw_as_weight(), threads);
            const float *bias = bias_of(layer, view, q.data(), score_bias, threads);
            attend(view, (int64_t)i, tables + 2 * i, q.data(), bias, attended.data(), threads);
            layer.step->mix(x, attended.data(), out, threads);
        }
    }

private:
    struct Layer {
        const LayerStep *step;
        int64_t view, angles, pairs;
        const float *key_bias, *frequencies;
        float amplitude;
    };

    WeightKind raw_as_weight() const {
        return raw_kind_ == RAW_F32 ? WEIGHT_F32 : raw_kind_ == RAW_BF16 ? WEIGHT_BF16 : WEIGHT_F16;
    }

    int64_t num_rows() const { return layers_[0].step->query_size() / layout_.head_dim; }

    // What a key bias adds to the scores of sealed tokens, (num_heads, tokens); null where nothing is to be added.
    const float *bias_of(const Layer &layer, const View &view, const float *q, std::vector<float> &scores, int threads) const {
        if (!layer.key_bias || !view.num_records) return nullptr;
        const int64_t rows = num_rows(), pairs = layer.pairs;
        const int64_t tokens = view.num_records * layout_.pages_per_record * layout_.page_tokens;
        const std::vector<float> constant((size_t)rows);
        std::vector<float> factors((size_t)(2 * rows * pairs));
        if ((int64_t)scores.size() < rows * tokens) scores.resize((size_t)(rows * tokens));
        float *cosines = factors.data(), *sines = cosines + rows * pairs;
        layer.step->bias_factors(q, layer.key_bias, layer.amplitude, cosines, sines);
        const RopeScores a{rows, pairs, view.position, tokens, cosines, sines, constant.data(), layer.frequencies, scores.data()};
        share_out(tokens, 16, rows * tokens * pairs, threads,
                  [&](int64_t begin, int64_t end) { active->rope_scores(a, begin, end); });
        return scores.data();
    }

    void attend(const View &view, int64_t layer, const uintptr_t *table, const float *q, const float *bias, float *out, int threads) const {
        const std::vector<RawRun> runs = view.runs_of(layer);
        const int64_t rows = num_rows() / layout_.kv_heads, count = view.num_records;
        const int64_t tokens = count * layout_.pages_per_record * layout_.page_tokens;
        const LayerAttend a{{layout_, rows, tokens, view.visible_from, view.visible_to, q, bias, softcap_,
                             at<const uint8_t *const>(table[0]) + view.first_record,
                             at<const uint8_t *const>(table[1]) + view.first_record},
                            count,
                            records_per_span_,
                            {raw_kind_, layout_.kv_heads, layout_.head_dim, rows, q, softcap_, runs.data(), (int64_t)runs.size()}};
        attend_layer(*active, a, out, threads);
    }

    Layout layout_;
    RawKind raw_kind_;
    int64_t records_per_span_;
    float softcap_;
    std::vector<Layer> layers_;
};
