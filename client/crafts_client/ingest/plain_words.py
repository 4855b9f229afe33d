"""Words that a pathology caption may hold without naming anybody.

They decide what is no name: after ``Patient:``, beside an initial, and in what the operator is
asked to look at. Public words only: histology and its everyday prose, German and French report
words, eponyms of diseases and stains, acronyms.
"""

import re

from crafts_core.vocabulary import corpus

_ENGLISH = """
a abdomen abdominal abnormal abortive about above abrupt abscess absence absent abundance
abundant accompanied according acid acinar acral active acute addendum additional
adenocarcinoma adequate adipose adjacent admixed admixture adnexal adrenal adrenocortical
adult advanced adventitia affected african after against age aged aggregate aggressive ago
air albicans albumin alcohol aligned all almost along also alternating although alveolar
amended american among amount ample ampulla anal analysis anastomosing anatomic and androgen
angiocentric angles angularis angulated anterior antibody antigen antral antrum any aorta
apex apparent appear appearance appeared appearing appendiceal appendix appreciated
architectural architecturally architecture archives are area arginase arising around
arranged arrangement array arrow arrowhead artery artifact ascending ascitic asian aspect
aspergillus aspirate assessment assisted associated asterisk asthma asymmetric atrial
attached atypia autopsy away axilla axillary bacilli back background bacteria banal band bar
basal base based basolaterally because become bed bedside before being below beneath benign
better between bilateral bile binucleated biopsied biopsies biopsy biphasic biphenotypic
bizarre black bladder bland bleeding block blood blue board bodies body bone bony border
both bottom bowel boy brain branching breast bridges brisk broad bronchial bronchus brown
brushing budding bundles but cadherin caecum calcified calcitonin calcium called calretinin
can cancer candida cannibalism cannot capillaries capillary capsule carcinoma carcinosarcoma
cardia cardiac cartilage case cassette caucasian cavities cecal cecum cell cellblock center
centered central centre cervical cervix change channels characteristic cheek chemotherapy
chest chief child childhood choroidal chromatin chromogranin chromophobe chronic cigar
ciliary circumscribed class classic classified clear clearing close closed closely club
clumped cluster coarse coexistence coexisting cohesive cohort cold coli collagen collecting
colliding colloid colon colonic color colorectal colored columnar combined comment common
compact compared comparison compatible complete completely complex component composed
compound comprises comprising computed concentric concerning concordant confined confirmed
confirming confirms confluent conjunctival connective consensus considered consisted
consistent consisting consists contact contain contained containing contour contrast control
conventional convoluted copy cord core corner corpora corpus corrected cortex could
counterstained counts covered cribriform criteria crowded crowding crush cryotherapy
cryptococcus cryptosporidium crypts cuboidal curettage curettings curvature curvilinear cut
cutaneous cyclin cyst cystic cytogenetics cytokeratin cytomegalovirus cytoplasm cytoplasmic
dark darkly data date day dear debris decidual dedifferentiated deep deeper deeply defined
definite definitive degree demarcated demonstrate demonstrated demonstrating dendritic dense
densely dentine denuded department depending depicting depicts deposit depth derived dermal
dermis dermo dermoepidermal descending desmin desmoglein detail detected determined
developed developing development diabetes diagnosed diagnoses diagnostic diameter did diff
different differential differentiated differing diffuse diffusely dilated discohesive
discordant disease disorder disordered dispersed display displayed displaying distal
distinct distinguish distributed diverticulum dominant dotted double duct ductal due
duodenal duodenum during dyscohesive e each ear early easily eccentric ectatic ectopic edema
edge editor effaced effacement effect eight eighth elastic elbow elderly element elevated
eleven elongated embedded emboli embryonal encapsulated enclosed endobronchial endocervix
endometrial endometrium endothelial enlarged enlargement enriched enteric entire entirely
entrapped enucleated eosin eosine eosinophil eosinophilia eosinophilic epidermal epidermis
epidural epithelial epitheliotropic epithelium esophageal esophagogastric esophagus
especially european evidence evident exam example excisional exhibit exhibited exhibiting
existing exocervix exon exophytic expanded expanding extending extensive extensively extent
extra extranodal extraskeletal extrathyroidal extremely eye eyelid face factor fallopian
family fascicles fashion fat fatty favoring fax feature featuring female femoral femur
fetoprotein fever few fewer fibers fibrillar fibrillary fibrin fibrosis fibroxanthoma field
fifth figure filled final finding fine finely first fish fistula five fixed flat flattened
flexure floating floret flow flower fluid foamy focal focally foci focus follicle follicular
foot for foreskin form formalin formed forming found four fourth foveolar fragment free
frequent frequently fresh from frontal frozen fundic fundus fungal fungus fuse fused
fusiform gallbladder gastric gastrin gastrointestinal gender genetics germ germinal giant
girl giving gland glass glassy glial glioblastoma glioma globules glucagon goblet gold good
grade granules granulosa gray greater green grey groin grooved grooves grooving gross ground
group grow growing growth guided h had haematoxylin hair half hand haphazardly has have
having head health healthy heart heavy heel helicobacter hemalun hematoxylin hemorrhage
hemorrhagic hemosiderin hence hepar hepatic hepatocellular here hernia herpes herpetic hers
heteromorphic heterotopic high higher highlighting highly hilar hilum him hip his hispanic
hist histo history hobnail hospital how however human hyaline hyperchromasia hyperchromatic
hyperchromatism hypoxia identified ileal ileocecal ileum iliac ill illustrates illustrating
image imaging immature immediately immunophenotype immunoreactive immunostain imparting
implant important imprint in incisura include including incomplete increase increased
indefinite indented index indicate indicated indicating indistinct individual individually
infant inferior infiltrate infiltrated infiltrating inflammation inflammatory infrequent
inguinal inhibin initial ink inked inner insert inset insulin intact intense interface
interlacing intermediate intermingled intermixed internal international interpreted
intersecting interspersed interstitial intervening intestinal intestine intimal intimate
into intra intracytoplasmic intraductal intraepithelial intraluminal intramucosal
intranuclear intratumoral invade invaded invading invasive invasively involved involvement
involving iris irisin iron irregularities irregularly island isolated its jejunal jejunum
joint journal junctional just keratin keratinizing kidney killer kindly knee known labeled
labelled labia laboratory lace lack lacking lacrimal lacunae lakes lamellated lamina
langerin large largely larger laryngeal larynx lateral lavage layer least left legend lens
lentigo lepidic lesional less lesser level light lightly like likely limited line linear
lined lining lip little liver lobe lobulated lobules local locally located long longitudinal
looking loose loss low lower lumen lumina luminal lung lymph lymphatic lymphocytes
lymphoepithelial lymphoma macronucleoli made magnetic magnifying main mainly malaria male
maligna malignancy malignant mammaglobin man mandible manner mantle many margin marginal
marked markedly marker marrow mass masses massive material matrix matter mature may measles
measuring medial mediastinal mediastinum medicine medium medullary melan melanin melanoma
membrane men menopausal merge mesenchymal mesothelial mesothelioma metastases metastasis
metastatic methylgreen microabscesses micrography micropapillary microphotography mid middle
might migrate mild mildly mimicking minimal minimally mitoses mixed mixture moderate
moderately molluscum monoclonal monomorphic mononuclear monophasic months more most mostly
mouth much mucin mucinous mucosa mucosae mucosal mucus multi multidisciplinary multifocal
multiforme multinuclear multinucleated multiple multivacuolated muscle muscularis must
mutant myocardium myometrium myxoid naevus nail nanoparticles napsin narrow nasal
nasopharynx natural nature near neck necrosis needle neither neoplasias neoplasm nerve nest
nested network neuroendocrine neutrophils nevus next nine ninth nipple nodal node nodule non
nonspecific nor normal nose not note noted novel now nuclear nuclei nucleoli nucleolus
nucleus number objective obscure observe observed obtained occasional occasionally
oesophageal oesophagus of often old omental one only open oral orbit organism oriented
origin original originated originating oropharyngeal orphan osteoclast osteoclastic other
otherwise our out outcome outer outlines outpatient outside ova oval ovarian ovarii ovary
overgrowth overlapping overlying overt overview packed paired palate pale palisading palm
pancreas pancreatic panel papilla papillae papillary papillomavirus paraffin parallel
paravertebral parenchyma parietal parosteal parotid part partial partially particles passage
patch patches patchy patella pathologist patient pattern pearls pediatric pelvic pelvis
pencillated pending penetrating penile pepper per percentage performed perianal pericardium
periductal perineum perineural perinuclear periosteal peripheral peripherally periphery
perirenal peritoneal peritoneum permanent phase phenotype pheochromocytoma phloxine phone
phosphate photomicrography physician picture pigment pigmented pilot pink pituitary plaques
plasma please pleomorphic pleomorphism pleura pleural plexiform plump podoplanin polygonal
polyhedral polymorphic polymorphism polyp poor poorly portion positive possible post
posterior powdery power pre predominant predominantly preexisting pregnancy preliminary
presence present presented presenting preserved previously primary primitive primordial
prior procedure produced producing prognostic projecting proliferate proliferated
proliferating prominent promontory pronounced prophylactic propria prostate prostatic
protein protruding protuberans proximal pseudo pseudopalisading pseudostratified pulmonary
pulp punch pushed pylori pylorus quadrant radial rare rate rather ratio reactive readily
received recent recognizable recommend rectal rectum recurrence recurrent red ref reference
referred regarding regards region regional regressed regular related relatively remains
reminiscent removed renal replaced replacement replaces replacing report represented
representing represents request research resected resection resemble resembling resident
residual response rest result rete reticulin retroperitoneal reveal revealed revealing
reverse review rib rich ridges right rim rimming ring rise risk round rounded rule sac
saffron safron saliva salivary salt same sample sampling sarcoma satellite scale scalp scan
scanned scanning scant scanty scar scarce scattered sclera sclerosing score scrotum second
secondary secretory section see seen sella seminal sentinel separate separated septa septae
seropositive serosa serosal serous serrated serum sessile set setting seven seventh several
severe severely sex shall shape shaped sharp sharply shave she sheath sheet short should
shoulder show showed showing shown side sided sieving sign signet significant silver similar
since sincerely single singly sinonasal sinus sinusoidal site situ six sixth size skeletal
skin skull sky slide slight slightly slit slough small smaller smear smoker smoking smooth
society soft solar sole solid somatic somatostatin some sometimes source space special
specific specified specimen spectrum spinal spindle spindled spindling spine spleen splenic
sporadic spread spreading sputum squamous squash stage staging stain stained staining
standard starry status stem stippled stomach stomal stool storiform strands stratified
streptococcus striated striking strips stroma stromal strong strongly strongyloides
structure struma studies study subcutis subepithelial submitted submucosa submucosal subpial
subtype subungual such suggesting suggestive sulcus summary superficial superior supporting
surface surgeon surgery surround surrounded surrounding suspected suture swab swelling
swollen synaptophysin synopsis synoptic synovial system tail taken takes tall template ten
tendon tenth terminal test testicular testis tetrazolium than thank that the their them then
therapy there therefore these they thick thickened thickening thickness thigh thin third
this thorax those three throat thrombus through throughout thumb thus thymic thymoma thymus
thyroglobulin thyroid tibia time tingible tissue today toe together tomography tongue tonsil
tonsillar top total touch toward trabeculae trachea tract traditional transbronchial
transformed transit transitional transplant transverse trauma traverses treated treatment
trial trichrome tru true trunk tubal tube tubules tubulopapillary tufts tumor tumoral tumour
tunica twelve two type ulcer ulcerated ulna ultrasound umbilicus under underlying underwent
undifferentiated uneven uniform unit unknown unless unremarkable until unusual upper ureter
ureteral urethra urethral urinary urothelial used using usual usually uterine uterus uveal
uvula vacuolated vacuole vagina vaginal vague vaguely valve variable variably variant varied
variegated varying vas vasculature vein vena ventricle vermis vertebral very vesicle vessel
via viable video view villi villus vimentin viral virus visceral visible vulva vulvar wall
walled was wave weight well were what when where whereas whether which while white who whole
whose why wide wildtype will with within without woman women world would woven wrist
xenograft year yes yolk you your zone
"""
_FOREIGN = """
abschnitt adénocarcinome anteil arterie auf aus ausgang avec befund bei beurteilung bild
biopsat biopsie blutung brust carcinome cellule cellules colique cytoplasme côlon dans darm
das dem den der des diagnose dickdarm die differenziert differenziertes droit droite drüse
drüsen duktales dünndarm ein eine einem einer eines entnahme epithel est examen fettgewebe
fibrose foie fragments für gauche gewebe gewebsprobe glande glandes grad gut haut herd herde
hinweis histologie hoden infiltrant invasiv invasives ist karzinom kein keine keinen keiner
kern kerne klinik klinische kolon kommentar lappen leber les links lobuläres lunge
lymphknoten magen magenschleimhaut makroskopie makroskopisch mamille mamma marge marges
metastase metastasen mikroskopie mikroskopisch milz mit mitose mitosen moelle muqueuse
muskel mäßig nach nachweis nebenniere nekrose nekrosen nicht niere normale noyau noyaux
oberer oder ohne organ par pièce poumon pour proben prostata präparat prélèvement
prélèvements rand rechts rein resektat resektion resektionsrand sans schilddrüse schlecht
schleimhaut schnitt schnitte sehr sein sind sont stanze stanzen sur teil tissu tumeur tumore
tumoren tumorzellen und une unterer untersuchung verdacht vom von wurde wurden zelle zellen
zellkerne zum zur zyste
"""
_EPONYMS = """
alcian annie antoni aschoff auer azzopardi barr barrett barré bartholin behçet bethesda
birbeck bloom borrmann bouin bowen brenner breslow brodmann brunner burkitt call castleman
civatte clara clark congo councilman cowdry cowper crohn cushing darier dorfman dukes
dutcher edmondson ellis ellison elston epstein ewing exner finkeldey flexner fuhrman furhman
gamna gandy gaucher giemsa gleason golgi gram graves grawitz grocott gutmann hamazaki
hashimoto hassall henle hirschsprung hodgkin homer hunner hurthle hürthle jeghers kaposi
kernohan kimmelstiel klatskin kossa krukenberg kulchitsky kupffer lambl langerhans langhans
lauren laurén leishman lennert leydig lieberkühn littre luschka lynch mallory malpighi
marjolin masson meckel meissner merkel michaelis mullerian ménétrier müller müllerian
neelsen nissl nottingham pacini paget pancoast paneth papanicolaou pappenheim perls peutz
peyer phyllodes psammoma purkinje quik reed reinke richardson richter rokitansky romanowsky
rosai rosenthal rouviere scarpa schatzki schaumann scherer schiff schiller schwann sertoli
sister sjögren skene spitz steiner sternberg sudan sézary touton ulex vater verocay virchow
waldenstrom waldenström waldeyer warthin wegener wesenberg whipple wilms wilson
wintersteiner wright zellballen zenker ziehl zollinger
"""
_ACRONYMS = """
adh ajcc alcl alk amacr atrx bcac bcl braf brca calla cdx cea cish cns dapi dcis dfsp dlbcl
dna dob eber ebna ebus egfr ema enktl erg fax ffpe figo fish fnab fnac gata gctb gfap gist
hcc hgpin hmb hmwck hnscc hpf hsil icd insm ipmn isup jak kras krt lcis lcnec lsil lvsi malt
mart mcc men mib mlh mrn msh msi nccn nhl nlphl nos nras nsclc opscc pals panin pas pash
pcnsl pdac pdgfra pdtc pet pnet pni ptcl pten ptld rcc rna rose sall satb scc scnc sma smzl
snomed sox ssn stas stat stump tblb tel tert til tils tnbc tnm ttf turb turp uicc vegf vin
who wt
"""

SURNAMES_TOO = frozenset({
    "black", "brown", "bush", "case", "cook", "cross", "day", "field", "fox", "good", "gray",
    "green", "grey", "hall", "hand", "head", "hill", "king", "little", "long", "major", "man",
    "march", "may", "old", "page", "park", "power", "rich", "rose", "short", "small", "stem",
    "stone", "strong", "wall", "way", "west", "white", "wide", "wood", "young",
})  # fmt: skip
"""Plain words that are many people's names as well."""
_TERM = re.compile(
    r"(?:[^h]omas?|omatous|[oi]sis|otic|itis|[ae]?emi[ac]|plasia|plastic|cytes?|cytic"
    r"|[aeioucps]tions?|sions?|ous|ical|ically|graphs?|graphic|olog(?:y|ic|ical)|oscop(?:y|ic)|ity"
    r"|chemistry|chemical|ectomy|otomy|ostomy|path(?:y|ic)|genic|oid|ular|philic|phages?|blasts?"
    r"|blastic|i[sz]ed|ative|karzinome?|gewebes?|schleimhaut|zellen?|keit|[a-zäöü]{4}ung(?:en)?)"
)
_LETTERS = re.compile(r"[^\W\d_]+")
_EPONYM_WORDS = frozenset(_EPONYMS.split())
_PLAIN_WORDS = frozenset(
    [
        *_ENGLISH.split(),
        *_FOREIGN.split(),
        *_ACRONYMS.split(),
        *(word for line in corpus() for word in _LETTERS.findall(line.lower())),
    ]
)


def is_eponym(word: str) -> bool:
    """Whether a disease, structure or stain is called after a person of this name."""
    return _stem(word) in _EPONYM_WORDS


def is_acronym(word: str) -> bool:
    """Short and with more than one capital: ``DLBCL``, ``PCa``. ``SMITH`` is one to this rule."""
    return len(word) < 6 and sum(letter.isupper() for letter in word) > 1


def is_plain(word: str) -> bool:
    """Whether a word belongs to pathology or its prose; of a compound, all its parts."""
    parts = _LETTERS.findall(_stem(word))
    return bool(parts) and all(_is_plain_part(part) for part in parts)


def _stem(word: str) -> str:
    """In small letters and without a genitive."""
    return re.sub(r"['’]s?$", "", word.lower())


def _is_plain_part(part: str) -> bool:
    if len(part) == 1 or part in _PLAIN_WORDS:
        return True
    singulars = (part.removesuffix("s"), part.removesuffix("es"))
    return any(word in _PLAIN_WORDS for word in singulars) or _ends_as_term(part)


def _ends_as_term(part: str) -> bool:
    """By ending: nobody is called -oma or -ectomy. Only the last 12 letters can decide."""
    ending = part[-12:]
    return any(_TERM.fullmatch(ending, start) for start in range(1, len(ending)))
